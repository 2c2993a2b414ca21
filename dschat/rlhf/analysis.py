"""What the models, and other sources of scores, say of answers."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dschat.arguments import RlhfArguments
from dschat.data.packing import PADDED, RowLayout
from dschat.data.rows import Rows
from dschat.data.token_batch import TokenBatch
from dschat.distributed.collectives import gather_rows
from dschat.engines.at_rest import in_use
from dschat.engines.memory_remedies import PhaseKind
from dschat.engines.out_of_memory import phase
from dschat.engines.step import DeepSpeedEngine
from dschat.models.forward import predictions_of, scores_of, token_logprobs_of, values_of
from dschat.rlhf.experience import AnswerAnalysis
from dschat.rlhf.first_pass import FirstPass, pass_over
from dschat.rlhf.rewards.sources import Rewards
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.rlhf.rollout.batch import RolloutBatch
from dschat.rlhf.tokenizers import RlhfTokenizers, build_retokenizer


@dataclass(frozen=True)
class ModelOutputs:
    """What the four models alone say of answers: [B, T], with anything beyond the answers, but `scores` [B].

    The fields are those of `AnswerAnalysis`; `values` and `scores` are None where no such model is asked.
    """

    logprobs: Tensor
    entropy: Tensor
    ref_logprobs: Tensor
    values: Tensor | None
    scores: Tensor | None

    @staticmethod
    def gather(parts: list["ModelOutputs"], rows: list[Tensor], answer_length: int) -> "ModelOutputs":
        """Outputs for this rank's micro-batches -> those of all ranks, each at its row's number."""
        row_numbers = gather_rows(torch.cat(rows).to(parts[0].logprobs.device), axis="data")
        order = row_numbers.argsort()

        def column(name: str) -> Tensor:
            values = [getattr(part, name) for part in parts]
            if values[0].dim() == 2:
                values = [torch.nn.functional.pad(v, (0, answer_length - v.shape[1])) for v in values]
            return gather_rows(torch.cat(values), axis="data")[order]

        return ModelOutputs(
            logprobs=column("logprobs"),
            entropy=column("entropy"),
            ref_logprobs=column("ref_logprobs"),
            values=None if parts[0].values is None else column("values"),
            scores=None if parts[0].scores is None else column("scores"),
        )


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
        prompts: Rows | None = None,
        rewards: Rewards | None = None,
        *,
        layout: RowLayout = PADDED,
        in_evaluation: bool = False,
    ) -> None:
        self._engine, self._prompts, self._rewards = engine, prompts, rewards
        self._layout, self._in_evaluation = layout, in_evaluation
        self._temperature = args.rollout.temperature
        self._num_tokens = len(tokenizers.actor)
        self._reading = build_retokenizer(engine.specs, "reward", tokenizers, prompts)

    @phase(PhaseKind.ANALYZING)
    @torch.no_grad()
    def analyze(
        self,
        rollout: RolloutBatch,
        rows: list[Tensor],
        *,
        with_values: bool = True,
        first_pass: FirstPass | None = None,
    ) -> AnswerAnalysis:
        """Analyse the answers of all ranks; `rows` are this rank's, a tensor of row numbers per forward pass.

        Every rank must call it, with as many passes, whose rows together are all rows once. Without
        `with_values` the critic is left out. `first_pass` keeps the graph over the first rows, which are
        passed last, by the critic and then the actor after the other models: so it waits for no other pass.
        """
        for engine in self._engine.trained:
            engine.eval()
        critic = self._engine.critic if with_values else None
        device = rollout.input_ids.device
        batches = [rollout.rows(part.to(device)) for part in rows]
        tokens = [batch.tokens.placed(self._layout) for batch in batches]
        # A model at a time, so that one whose weights rest on the CPU comes to the device once.
        frozen = list(zip(tokens, self._ref_logprobs(tokens), self._scores(batches, tokens), strict=True))
        parts = [
            self._own_outputs(*frozen[i], critic, first_pass if i == 0 else None)
            for i in reversed(range(len(rows)))
        ]
        parts.reverse()
        outputs = ModelOutputs.gather(parts, rows, rollout.answer_mask.shape[1])
        of_models = (outputs.logprobs, outputs.entropy, outputs.ref_logprobs, outputs.values)
        if self._rewards is None:
            assert outputs.scores is not None, "without other sources of scores there is a reward model"
            return AnswerAnalysis(*of_models, outputs.scores)
        assert self._prompts is not None, "sources of scores beside a model read the data rows of prompts"
        summed = self._rewards.score(
            rollout, rows, self._prompts, outputs.scores, in_evaluation=self._in_evaluation
        )
        return AnswerAnalysis(*of_models, summed.scores, summed.by_source, summed.num_errors)

    # No logits outlive their call: they are the largest tensor here.

    def _ref_logprobs(self, batches: list[TokenBatch]) -> list[Tensor]:
        """The reference model's log-probabilities of each micro-batch, [B, T]."""
        options: dict[str, Any] = {"num_tokens": self._num_tokens, "temperature": self._temperature}
        with self._engine.reference() as reference:
            return [token_logprobs_of(reference, tokens, **options) for tokens in batches]

    def _scores(self, rollouts: list[RolloutBatch], batches: list[TokenBatch]) -> list[Tensor | None]:
        """The reward model's scores of each micro-batch, [B]; None where there is no such model."""
        if self._engine.reward is None:
            return [None] * len(batches)
        if self._reading:
            batches = [self._reading.read(rollout).tokens.placed(self._layout) for rollout in rollouts]
        with in_use(self._engine.reward) as reward_model:
            return [scores_of(reward_model, tokens) for tokens in batches]

    def _own_outputs(
        self,
        tokens: TokenBatch,
        ref_logprobs: Tensor,
        scores: Tensor | None,
        critic: DeepSpeedEngine | None,
        first_pass: FirstPass | None,
    ) -> ModelOutputs:
        """What critic and actor say of a micro-batch, beside what the frozen models said."""
        values = None
        if critic is not None:
            with pass_over(critic, keeps_graph=first_pass is not None and first_pass.keeps_critic):
                values = values_of(critic, tokens)
        with pass_over(self._engine.actor, keeps_graph=first_pass is not None and first_pass.keeps_actor):
            logprobs, entropy = predictions_of(
                self._engine.actor, tokens, num_tokens=self._num_tokens, temperature=self._temperature
            )
        assert entropy is not None, "it is computed unless it is left out"
        if first_pass is not None:
            first_pass.keep(logprobs, entropy, values)
        return ModelOutputs(
            logprobs=logprobs.detach(),
            entropy=entropy.detach(),
            ref_logprobs=ref_logprobs,
            values=None if values is None else values.detach(),
            scores=scores,
        )
