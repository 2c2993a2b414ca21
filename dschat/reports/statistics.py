"""How sure a number is: intervals by prompt, win rates, calibration, correlation. Arrays in, numbers out.

Intervals are of 95 %. Values with one number in `groups`, such as those of the pairs of one prompt, may
depend on one another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dschat.distributed.statistics import standard_error

Z = 1.959964
"""Standard errors on either side of a mean, for 95 %."""
NUM_RESAMPLED = 400


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; the interval is NaN where nothing is known of it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return self.shown(".3f")

    def shown(self, form: str) -> str:
        """All three numbers in a format, such as ".1%"."""
        known = f"{self.low:{form}} to {self.high:{form}}" if self.low <= self.high else "interval unknown"
        return f"{self.value:{form}} ({known})"


def mean(values: np.ndarray, groups: np.ndarray) -> Estimate:
    """The mean and its interval by the standard error clustered by group; both [N].

    With G groups the quantile is that of the normal distribution: narrow for fewer than 20, and NaN for one.
    """
    value, error = float(values.mean()), _error(values, groups) if len(np.unique(groups)) > 1 else math.nan
    return Estimate(value, value - Z * error, value + Z * error)


def rate(values: np.ndarray, groups: np.ndarray) -> Estimate:
    """The mean of values in [0, 1], such as wins with ties as halves, with Wilson's interval.

    (Wilson 1927.) The number of observations is that of independent ones with the same standard error,
    clustered by group, at most the groups where all values are equal; so the interval is within [0, 1].
    """
    value, error = float(values.mean()), _error(values, groups)
    independent = value * (1 - value) / error**2 if error > 0 else len(np.unique(groups))
    return wilson(value, min(max(independent, 1.0), len(values)))


def wilson(value: float, number: float) -> Estimate:
    """A rate seen in so many independent observations, with Wilson's score interval."""
    centre = (value + Z**2 / (2 * number)) / (1 + Z**2 / number)
    half = Z / (1 + Z**2 / number) * math.sqrt(value * (1 - value) / number + Z**2 / (4 * number**2))
    return Estimate(value, max(centre - half, 0.0), min(centre + half, 1.0))


def agresti_coull(values: np.ndarray, groups: np.ndarray) -> Estimate:
    """As `rate`, with the interval of `cautious_interval`."""
    value, error, num_groups = float(values.mean()), _error(values, groups), len(np.unique(groups))
    return Estimate(value, *cautious_interval(value, error, len(values), num_groups))


def cautious_interval(value: float, error: float, number: float, num_groups: float) -> tuple[float, float]:
    """The 95 % interval of a rate that has this standard error over `number` values of `num_groups` groups.

    By Agresti and Coull 1998, with z = 2, which holds for few values and at 0 and 1 too. The values count as
    so many independent ones as have this error.
    """
    independent = value * (1 - value) / error**2 if error > 0 else num_groups
    n = min(max(independent, 1.0), number) + 4
    centre = (value * (n - 4) + 2) / n
    half = 2 * math.sqrt(centre * (1 - centre) / n)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def bootstrapped(
    statistic: Callable[..., float], columns: Sequence[np.ndarray], groups: np.ndarray, seed: int = 0
) -> Estimate:
    """Any statistic of columns [N], with the percentile interval of groups drawn again with replacement."""
    random = np.random.default_rng(seed)
    names, places = np.unique(groups, return_inverse=True)
    found = []
    for _ in range(NUM_RESAMPLED if len(names) > 1 else 0):
        times = np.bincount(random.integers(0, len(names), len(names)), minlength=len(names))
        rows = np.repeat(np.arange(len(groups)), times[places])
        found.append(statistic(*(column[rows] for column in columns)))
    known = np.array(found)[~np.isnan(found)]
    low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (math.nan, math.nan)
    return Estimate(statistic(*columns), float(low), float(high))


@dataclass(frozen=True)
class Bin:
    """Predictions of similar probability."""

    confidence: float
    """The mean of what was predicted,"""
    share: float
    """the share that was right,"""
    number: int
    """and how many they are."""
    rows: np.ndarray
    """Their places, [number]."""


def calibration_curve(probabilities: np.ndarray, right: np.ndarray, num_bins: int = 10) -> list[Bin]:
    """Predicted against observed, in bins of equal width over [0.5, 1]; empty ones are left out.

    `probabilities` are those of the answer that was taken for the better one, so at least 0.5.
    """
    places = _bins(probabilities, num_bins)
    rows = [np.flatnonzero(places == place) for place in range(num_bins)]
    return [Bin(float(probabilities[r].mean()), float(right[r].mean()), len(r), r) for r in rows if len(r)]


def calibration_error(probabilities: np.ndarray, right: np.ndarray, num_bins: int = 10) -> float:
    """The expected calibration error, https://arxiv.org/abs/1706.04599: the mean over all predictions of how
    far the share that is right in their bin is from the mean probability there."""
    off = np.bincount(_bins(probabilities, num_bins), weights=probabilities - right)
    return float(np.abs(off).sum()) / len(probabilities)


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's; NaN where one of them does not vary."""
    first, second = first - first.mean(), second - second.mean()
    scale = math.sqrt(float((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / scale if scale > 0 else math.nan


def lapse_rate(lead: np.ndarray, groups: np.ndarray) -> Estimate:
    """How often labels are the other way round whatever the scores: e of P = e + (1 - 2e) sigmoid(b lead).

    `lead` [N] is by how much the labelled answer's score is higher. Maximum likelihood over a grid of e and
    of the scale b; the interval is that of the likelihood ratio, over as many values as are independent.
    """
    scale = float(np.abs(lead).mean())
    if scale == 0 or not np.isfinite(scale):
        return Estimate(math.nan, math.nan, math.nan)
    right = (lead > 0).astype(float)
    some = lead[:: max(1, len(lead) // 4000)]  # more would change nothing but the time
    value, error = float(right.mean()), _error(right, groups)
    independent = value * (1 - value) / error**2 if error > 0 else float(len(np.unique(groups)))
    weight = min(independent, len(lead)) / len(some)
    rates = np.linspace(0, 0.5, 51)[:-1]
    best = np.full(len(rates), -math.inf)
    for b in np.geomspace(0.05, 50, 31) / scale:
        share = 1 / (1 + np.exp(-np.clip(b * some, -500, 500)))
        probability = rates[:, None] + (1 - 2 * rates[:, None]) * share
        best = np.maximum(best, np.log(np.maximum(probability, 1e-300)).sum(axis=1))
    inside = rates[weight * (best.max() - best) <= Z**2 / 2]
    return Estimate(float(rates[best.argmax()]), float(inside.min()), float(inside.max()))


def _bins(probabilities: np.ndarray, number: int) -> np.ndarray:
    return np.clip(((probabilities - 0.5) * 2 * number).astype(int), 0, number - 1)


def _error(values: np.ndarray, groups: np.ndarray) -> float:
    return standard_error(torch.from_numpy(np.asarray(values, float)), torch.from_numpy(groups)).item()
