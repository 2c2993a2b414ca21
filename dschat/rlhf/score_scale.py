"""The scale that raw scores are learned on, and what stands in for a score that is not finite."""

from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from dschat.arguments import PpoArguments
from dschat.console import messages
from dschat.rlhf.experience import AnswerAnalysis, ScoreShaping
from dschat.rlhf.running_statistics import RunningStatistics


class ScoreScale:
    """How raw scores are shaped: alike throughout a run, or by the statistics of all scores so far."""

    def __init__(
        self, args: PpoArguments, model_scale: tuple[float, float] = (0.0, 1.0), *, has_sources: bool = False
    ) -> None:
        """`model_scale` is the mean and standard deviation of the reward model's scores in step 2.

        It is not used where other sources are summed up with the reward model's scores (`has_sources`):
        there it is for the model's part alone.
        """
        mean, std = (0.0, 1.0) if has_sources else model_scale
        self.fixed = ScoreShaping(
            clip=args.reward_clip, missing_eos_penalty=args.missing_eos_penalty, mean=mean, std=std
        )
        self._running = RunningStatistics() if args.score_scale == "running" else None

    def shaping_of(self, scores: Tensor) -> ScoreShaping:
        """The shaping of a rollout batch's raw scores [B], which running statistics count in first."""
        if self._running is None or not scores.isfinite().all():  # where no score is, nothing is learned
            return self.fixed
        self._running.update(scores)
        return replace(self.fixed, mean=self._running.mean, std=self._running.std)

    def state(self) -> dict[str, Any] | None:
        """The running statistics, for JSON; None without them."""
        return asdict(self._running) if self._running else None

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Go on from what `state` gave."""
        if self._running is not None and state is not None:
            self._running = RunningStatistics(**state)


class NonFiniteScores:
    """Scores that are not finite, replaced so that one of them does not spoil a rollout batch."""

    def __init__(self) -> None:
        self._has_warned = False

    def replaced(self, analysis: AnswerAnalysis, *, ppo_step: int) -> tuple[AnswerAnalysis, int]:
        """`AnswerAnalysis.with_finite_scores`, with a warning the first time. `ppo_step` counts from 1."""
        finite, num_bad = analysis.with_finite_scores()
        if num_bad and not self._has_warned:
            self._has_warned = True
            messages.warning(
                f"PPO step {ppo_step}: {num_bad} of "
                f"{len(finite.scores)} scores are not finite. Such an answer counts with the mean of the "
                "others, and where there is no other the updates are skipped. metrics.jsonl goes on counting "
                "them as nonfinite_scores; a reward model that overflows needs --dtype bf16 or fp32."
            )
        return finite, num_bad
