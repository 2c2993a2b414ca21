"""What the models, and other sources of scores, say of answers."""

from dataclasses import replace

import torch
from datasets import Dataset
from torch import Tensor

from dschat.arguments import RlhfArguments
from dschat.engines.memory_remedies import PhaseKind
from dschat.engines.out_of_memory import phase
from dschat.engines.step import DeepSpeedEngine
from dschat.models.forward import predictions_of, scores_of, token_logprobs_of, values_of
from dschat.rlhf.experience import AnswerAnalysis
from dschat.rlhf.rewards.sources import Rewards
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.rlhf.rollout.batch import RolloutBatch
from dschat.rlhf.tokenizers import RlhfTokenizers, build_retokenizer


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
    def analyze(
        self, rollout: RolloutBatch, rows: list[Tensor], *, with_values: bool = True
    ) -> AnswerAnalysis:
        """Analyse the answers of all ranks; `rows` are this rank's, a tensor of row numbers per forward pass.

        Every rank must call it, with as many passes, whose rows together are all rows once. Without
        `with_values` the critic is left out.
        """
        for engine in self._engine.trained:
            engine.eval()
        critic = self._engine.critic if with_values else None
        parts = [self._analyze_rows(rollout.rows(part.to(rollout.input_ids.device)), critic) for part in rows]
        analysis = AnswerAnalysis.gather(parts, rows, rollout.answer_mask.shape[1])
        if self._rewards is None:
            return analysis
        summed = self._rewards.score(
            rollout, rows, self._prompts, analysis.scores, in_evaluation=self._in_evaluation
        )
        return replace(
            analysis, scores=summed.scores, by_source=summed.by_source, num_errors=summed.num_errors
        )

    def _analyze_rows(self, batch: RolloutBatch, critic: DeepSpeedEngine | None) -> AnswerAnalysis:
        tokens = batch.tokens
        softmax = {"num_tokens": self._num_tokens, "temperature": self._temperature}
        # No logits outlive their call: they are the largest tensor here.
        logprobs, entropy = predictions_of(self._engine.actor, tokens, **softmax)
        with self._engine.reference() as reference:
            ref_logprobs = token_logprobs_of(reference, tokens, **softmax)
        return AnswerAnalysis(
            logprobs=logprobs,
            entropy=entropy,
            ref_logprobs=ref_logprobs,
            values=values_of(critic, tokens) if critic else None,
            scores=self._scores(batch) if self._engine.reward else None,
        )

    def _scores(self, batch: RolloutBatch) -> Tensor:
        read = self._reading.read(batch) if self._reading else batch
        return scores_of(self._engine.reward, read.tokens)
