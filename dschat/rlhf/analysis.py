"""What the models, and other sources of scores, say of answers."""

from dataclasses import replace

import torch
from datasets import Dataset
from torch import Tensor

from dschat.arguments import RlhfArguments
from dschat.engines.memory_remedies import PhaseKind
from dschat.engines.out_of_memory import phase
from dschat.engines.step import DeepSpeedEngine
from dschat.losses import token_entropy, token_logprobs
from dschat.rlhf.experience import AnswerAnalysis, at_answers
from dschat.rlhf.rewards.sources import Rewards
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.rlhf.rollout.batch import RolloutBatch
from dschat.rlhf.tokenizers import RlhfTokenizers, build_retokenizer


def answer_logits(model: DeepSpeedEngine, batch: RolloutBatch, num_tokens: int) -> Tensor:
    """The logits of the decisions that emitted the answers, over the tokenizer's `num_tokens`. -> [B, T, V].

    The one way logits are computed for old, new and reference policy: a ratio compares like with like. Rows
    that pad a model's vocabulary are left out, as they are in sampling.
    """
    first, last = batch.prompt_length - 1, batch.input_ids.shape[1] - 1
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=torch.arange(first, last, device=batch.input_ids.device),
        use_cache=False,
    )
    return output.logits[..., :num_tokens]


def values_at_tokens(model: DeepSpeedEngine, batch: RolloutBatch) -> Tensor:
    """The head's output at every position. -> fp32 [B, P + T]."""
    return model(batch.input_ids, batch.attention_mask, batch.position_ids, return_values=True)


def scores_of_answers(model: DeepSpeedEngine, batch: RolloutBatch) -> Tensor:
    """The reward model's output at each answer's last valid token. -> fp32 [B]."""
    last = batch.prompt_length + batch.answer_lengths - 1
    return values_at_tokens(model, batch).gather(1, last.unsqueeze(1)).squeeze(1)


def values_at_answers(model: DeepSpeedEngine, batch: RolloutBatch) -> Tensor:
    """The critic's values of the decisions. -> fp32 [B, T]."""
    return at_answers(values_at_tokens(model, batch), batch.prompt_length)


class AnswerAnalyzer:
    """Actor, reference, critic and reward model (where there are such), and how each reads answers.

    The data set of `prompts` is needed where the reward model has a tokenizer of its own
    (`tokenizers.own`), and where there are `rewards`: other sources of scores, to be summed up with the
    reward model's.
    """

    def __init__(
        self,
        engine: DeepSpeedRLHFEngine,
        tokenizers: RlhfTokenizers,
        args: RlhfArguments,
        prompts: Dataset | None = None,
        rewards: Rewards | None = None,
        *,
        in_evaluation: bool = False,
    ) -> None:
        self._engine, self._prompts, self._rewards = engine, prompts, rewards
        self._in_evaluation = in_evaluation
        self._temperature = args.rollout.temperature
        self._num_tokens = len(tokenizers.actor)
        self._reading = build_retokenizer(engine.specs, "reward", tokenizers, prompts)

    @phase(PhaseKind.ANALYZING)
    @torch.no_grad()
    def judge(self, rollout: RolloutBatch, rows: list[Tensor], *, with_values: bool = True) -> AnswerAnalysis:
        """Judge the answers of all ranks; `rows` are this rank's, a tensor of row numbers a forward pass.

        Every rank must call it, with as many passes, whose rows together are all rows once. Without
        `with_values` the critic is left out.
        """
        for engine in self._engine.trained:
            engine.eval()
        critic = self._engine.critic if with_values else None
        parts = [self._judge_rows(rollout.rows(part.to(rollout.input_ids.device)), critic) for part in rows]
        judgement = AnswerAnalysis.gather(parts, rows, rollout.answer_mask.shape[1])
        if self._rewards is None:
            return judgement
        said = self._rewards.score(
            rollout, rows, self._prompts, judgement.scores, in_evaluation=self._in_evaluation
        )
        return replace(judgement, scores=said.scores, by_source=said.by_source, num_errors=said.num_errors)

    def _judge_rows(self, batch: RolloutBatch, critic: DeepSpeedEngine | None) -> AnswerAnalysis:
        logits = answer_logits(self._engine.actor, batch, self._num_tokens)
        logprobs = token_logprobs(logits, batch.answers, temperature=self._temperature)
        entropy = token_entropy(logits, temperature=self._temperature)
        del logits  # the largest tensor here: gone before the reference model makes its own
        with self._engine.reference() as reference:
            ref_logits = answer_logits(reference, batch, self._num_tokens)
        return AnswerAnalysis(
            logprobs=logprobs,
            entropy=entropy,
            ref_logprobs=token_logprobs(ref_logits, batch.answers, temperature=self._temperature),
            values=values_at_answers(critic, batch) if critic else None,
            scores=self._scores(batch) if self._engine.reward else None,
        )

    def _scores(self, batch: RolloutBatch) -> Tensor:
        return scores_of_answers(self._engine.reward, self._reading.read(batch) if self._reading else batch)
