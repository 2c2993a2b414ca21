"""What optimising a reward model will do, told from best-of-n before any training. Arrays in, numbers out.

The best of n answers by the reward model, n = 1, 2, ..., is a policy at a KL divergence of
ln n - (n - 1) / n from the model that was sampled (Stiennon et al., https://arxiv.org/abs/2009.01325; an
upper bound, Beirami et al., https://arxiv.org/abs/2401.01879). Its score and what is believed of its answers
("gold") against that KL are the curves of Gao et al., https://arxiv.org/abs/2210.10760.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dschat.reports.statistics import Estimate

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
NUM_RESAMPLED = 1000
MARGIN = 1.5
"""Times the KL of gold's peak that PPO may reach: its KL goes up and down by a fifth from step to step."""


def kl_of(n: int) -> float:
    """Nats between best-of-n and what it chooses from."""
    return math.log(n) - (n - 1) / n


def best_of_n(scores: np.ndarray, values: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The mean value of the answer with the highest score, over all sets of n of N answers.

    [P, N] both -> [P, K] for K sizes. Unbiased (Nakano et al., https://arxiv.org/abs/2112.09332, appendix I):
    of C(N, n) sets the i-th lowest score is the highest in C(i - 1, n - 1). Of answers with one score any may
    be taken.
    """
    num_prompts, total = scores.shape
    order = scores.argsort(axis=1, kind="stable")
    ranked, sorted_scores = (np.take_along_axis(x.astype(float), order, axis=1) for x in (values, scores))
    for row in range(num_prompts):
        _, group = np.unique(sorted_scores[row], return_inverse=True)
        ranked[row] = (np.bincount(group, ranked[row]) / np.bincount(group))[group]
    weights = np.array(
        [[math.comb(i, n - 1) / math.comb(total, n) for i in range(total)] for n in sizes], dtype=float
    )
    return ranked @ weights.T


@dataclass(frozen=True)
class Point:
    """Best-of-n, over the prompts."""

    n: int
    kl: float
    score: Estimate
    """Of the answers that are taken, by the reward model."""
    gold: Estimate
    gain: Estimate
    """Of gold over n = 1, paired by prompt."""


@dataclass(frozen=True)
class Forecast:
    """The curve, and what follows from it. Intervals are of 95 %, over prompts drawn again."""

    points: list[Point]
    peak: Point
    """Where gold is highest."""
    turning_kl: Estimate
    """The KL of the peak, with that of the peaks of other draws of prompts."""
    turns: bool
    """Whether gold at the largest n is below its peak by more than noise."""
    kl_target: float | None
    """The smallest KL whose gold is within one standard error of the peak; None where nothing is gained."""
    max_kl: float | None
    """Half again the KL of the peak, or less where gold is below its peak by more than noise before that;
    where gold is highest at the largest n, the KL of that. None where nothing is gained."""

    @property
    def is_worth_it(self) -> bool:
        """Whether gold rises by more than noise anywhere."""
        return self.peak.gain.low > 0

    @property
    def verdict(self) -> str:
        """The forecast in a sentence."""
        last, peak = self.points[-1], self.peak
        if self.is_worth_it:
            end = f"has not turned at KL {last.kl:.2f}"
            if self.turns:
                end = f"falls from KL {self.turning_kl.shown('.2f')} on (PPO may turn elsewhere)"
            elif peak is not last:
                end = f"is lower at KL {last.kl:.2f}, though within noise"
            return f"worth PPO: by best-of-n gold gains {peak.gain} at KL {peak.kl:.2f}, and {end}"
        if last.gain.high < 0 or self.turns:
            return f"this reward model is not worth PPO: gold falls from KL {peak.kl:.2f} on"
        return f"this reward model is not worth PPO: up to KL {last.kl:.2f} gold gains nothing beyond noise"


def forecast(sizes: Sequence[int], score: np.ndarray, gold: np.ndarray, seed: int = 0) -> Forecast:
    """The forecast from score and gold of the best of each of K `sizes`, for P prompts; [P, K] each."""
    random, num = np.random.default_rng(seed), len(score)
    times = random.multinomial(num, np.full(num, 1 / num), NUM_RESAMPLED) / num
    shown, believed = (values.mean(axis=0) for values in (score, gold))
    shown_again, believed_again = (times @ values for values in (score, gold))
    gains = believed_again - believed_again[:, :1]
    points = [
        Point(
            n,
            kl_of(n),
            _estimate(shown[k], shown_again[:, k]),
            _estimate(believed[k], believed_again[:, k]),
            _estimate(believed[k] - believed[0], gains[:, k]),
        )
        for k, n in enumerate(sizes)
    ]
    best = int(believed.argmax())
    kls = np.array([point.kl for point in points])
    below = believed_again - believed_again[:, [best]]
    falls = [k for k in range(best + 1, len(sizes)) if np.percentile(below[:, k], 97.5) < 0]
    near = [k for k in range(best + 1) if believed[best] - believed[k] <= below[:, k].std()]
    found = Forecast(
        points,
        points[best],
        _estimate(kls[best], kls[believed_again.argmax(axis=1)]),
        turns=bool(falls) and falls[-1] == len(sizes) - 1,
        kl_target=None,
        max_kl=None,
    )
    if not found.is_worth_it:
        return found
    target = next((kls[k] for k in near if kls[k] > 0), kls[best])
    bounds = [kls[-1], *([MARGIN * kls[best]] if best + 1 < len(kls) else []), *kls[falls[:1]]]
    largest = float(min(bounds))
    return replace(found, kl_target=float(target), max_kl=largest)


def _estimate(value: float, again: np.ndarray) -> Estimate:
    low, high = np.percentile(again, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high))
