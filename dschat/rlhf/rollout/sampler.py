"""Answers of all ranks from a back end, the first of them checked against the training model."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from dschat.data.collate import PromptBatch
from dschat.engines.memory_remedies import PhaseKind
from dschat.engines.out_of_memory import phase
from dschat.rlhf.experience import AnswerAnalysis
from dschat.rlhf.phase_times import PhaseTimes
from dschat.rlhf.rollout.agreement import RolloutCheck
from dschat.rlhf.rollout.backend import RolloutBackend, Sampling
from dschat.rlhf.rollout.batch import RolloutBatch, gather_rollouts


class RolloutSampler:
    """A back end with the sampling that the flags ask for."""

    def __init__(self, backend: RolloutBackend, sampling: Sampling, pad_token_id: int) -> None:
        self.backend = backend
        self._sampling, self._pad_token_id = sampling, pad_token_id

    @phase(PhaseKind.SAMPLING)
    def sample(self, prompts: Sequence[PromptBatch], *, ppo_step: int) -> RolloutBatch:
        """Answers to this rank's prompts, with those of all ranks. Every rank must call it.

        `ppo_step` is part of the key of the noise.
        """
        sampling = replace(self._sampling, ppo_step=ppo_step)
        with self.backend.session():
            rollouts = [self.backend.generate(batch, sampling) for batch in prompts]
        return gather_rollouts(rollouts, self._pad_token_id)


class CheckedSampler:
    """A sampler and the analysis of its answers, which are compared with the training model.

    The check costs no pass of its own, as the answers are analysed anyway. It is made of the first answers,
    or `every_time`; without a `check` of none.
    """

    def __init__(
        self,
        sampler: RolloutSampler,
        analyze: Callable[[RolloutBatch, int], AnswerAnalysis],
        check: RolloutCheck | None,
        times: PhaseTimes,
        *,
        every_time: bool = False,
    ) -> None:
        """`analyze` takes a rollout batch and the number of its PPO step."""
        self._sampler, self._analyze = sampler, analyze
        self._check, self._times, self._every_time = check, times, every_time

    def sample_and_analyze(
        self, prompts: Sequence[PromptBatch], *, ppo_step: int
    ) -> tuple[RolloutBatch, AnswerAnalysis]:
        """Answers of all ranks to their prompts, and their analysis. Every rank must call it.

        Raises `UserError` where answers fail the check.
        """
        rollout, analysis = self._once(prompts, ppo_step)
        check = self._check
        if not self._every_time:
            self._check = None  # once, before this process learns anything
        if check is None:
            return rollout, analysis
        backend = self._sampler.backend
        if backend.uses_cache:
            if not check.wants_uncached(rollout, analysis.logprobs):
                return rollout, analysis
            backend.uses_cache = False
            rollout, analysis = self._once(prompts, ppo_step)
        check.require_agreement(rollout, analysis.logprobs)
        return rollout, analysis

    def _once(self, prompts: Sequence[PromptBatch], ppo_step: int) -> tuple[RolloutBatch, AnswerAnalysis]:
        with self._times.measured("generation"):
            rollout = self._sampler.sample(prompts, ppo_step=ppo_step)
        with self._times.measured("experience"):
            return rollout, self._analyze(rollout, ppo_step)
