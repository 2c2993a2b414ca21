"""Whether a policy is better than another by more than noise: the same prompts, answered by both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dschat.distributed.statistics import standard_error

SURE = 2.0
"""By so many standard errors a policy must be better, or worse, for that to be said."""


@dataclass(frozen=True)
class Answers:
    """What an evaluation found of each answer. Every evaluation of a run has them in the same order."""

    prompts: Sequence[int]
    """The prompt's row in its data set."""
    scores: Sequence[float]
    """As the reward model or the other sources of scores gave them."""
    objectives: Sequence[float]
    """As PPO learns from them, less beta times the KL."""

    @classmethod
    def of(cls, prompts: Tensor, scores: Tensor, objectives: Tensor) -> Answers:
        """All [B]."""
        return cls(prompts.tolist(), scores.tolist(), objectives.tolist())


@dataclass(frozen=True)
class Gain:
    """By how much one policy's answers are better than another's to the same prompts."""

    mean: float
    stderr: float
    """Of the mean of the differences, the answers to a prompt taken together; inf where there is one prompt,
    which tells nothing of others."""

    @property
    def is_beyond_noise(self) -> bool:
        """Whether the better policy is better by more than the standard error; NaN is not."""
        return abs(self.mean) > self.stderr

    def __str__(self) -> str:
        error = f"+- {self.stderr:.2g}" if math.isfinite(self.stderr) else "(its error is unknown)"
        return f"{self.mean:+.4g} {error}"


def gain(before: Sequence[float], after: Sequence[float], prompts: Sequence[int]) -> Gain:
    """The mean of the differences of two policies' values, one an answer, to the same `prompts`."""
    differences = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    groups = torch.tensor(prompts)
    stderr = standard_error(differences, groups).item() if len(set(prompts)) > 1 else math.inf
    return Gain(differences.mean().item(), stderr)


def gained_objective(before: Answers, after: Answers) -> Gain:
    """By how much the policy of `after` is better in what PPO maximises."""
    return gain(before.objectives, after.objectives, before.prompts)


def gained_score(before: Answers, after: Answers) -> Gain:
    """By how much its scores are better."""
    return gain(before.scores, after.scores, before.prompts)


def did_it_help(start: Answers, exported: Answers) -> str:
    """What held-out prompts say of the exported actor beside the one that the run started from."""
    objective = gained_objective(start, exported)
    word = "no different from the start by more than noise"
    if abs(objective.mean) > SURE * objective.stderr:
        word = f"{'better' if objective.mean > 0 else 'worse'} than the start"
    return (
        f"{word}: score {gained_score(start, exported)}, score - beta KL {objective} "
        f"({len(start.prompts)} answers to {len(set(start.prompts))} held-out prompts)"
    )
