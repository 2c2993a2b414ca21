"""The coefficient of the KL penalty, held or steered towards a target."""

import math
from dataclasses import dataclass

LARGEST_ERROR = 0.2


@dataclass
class KlController:
    """beta of docs/ppo.md: a constant without a target.

    With one, after each PPO step beta *= 1 + clip(KL / target - 1, -0.2, 0.2) * samples / horizon, Ziegler et
    al. 2019 (https://arxiv.org/abs/1909.08593), as their code has it. `horizon` is in answers.
    """

    coef: float
    target: float | None = None
    horizon: int = 1000

    def update(self, kl: float, num_samples: int) -> None:
        """Take in the KL (nats per answer, the mean of k1's sum) of a rollout batch of `num_samples` answers.

        A batch of more than a horizon counts as one horizon, so that beta stays positive. A KL that is not
        finite says nothing.
        """
        if self.target is None or not math.isfinite(kl):
            return
        error = min(max(kl / self.target - 1, -LARGEST_ERROR), LARGEST_ERROR)
        self.coef *= 1 + error * min(num_samples / self.horizon, 1.0)
