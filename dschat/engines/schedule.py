"""Learning-rate schedules: those of transformers, number for number.

`transformers.get_scheduler` is not called, because its module imports `transformers.trainer_utils` and thus
PEFT: half a second of every start.
"""

import math
from collections.abc import Callable
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dschat.errors import UserError

END_OF_POLYNOMIAL = 1e-7
"""The learning rate in which a polynomial schedule ends."""


def learning_rate_schedule(
    name: str, optimizer: Optimizer, *, num_warmup_steps: int, num_training_steps: int
) -> LambdaLR:
    """The schedule of an --lr_scheduler_type: from 0 up to the optimiser's rate, then down to the end.

    Formulas: transformers 5.23, optimization.py. Raises `UserError` where a polynomial schedule would rise.
    """
    peak = optimizer.defaults["lr"]
    if name == "polynomial" and peak <= END_OF_POLYNOMIAL:
        raise UserError(
            f"--lr_scheduler_type polynomial ends at {END_OF_POLYNOMIAL:g}, which is not below the learning "
            f"rate {peak:g}; take another type or a higher rate."
        )
    falling = {
        "linear": lambda progress: max(0.0, 1 - progress),
        "cosine": lambda progress: max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress))),
        "cosine_with_restarts": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)) * (progress < 1),
        "polynomial": lambda progress: (
            max(0.0, 1 - progress) * (1 - END_OF_POLYNOMIAL / peak) + END_OF_POLYNOMIAL / peak
        ),
        "constant": lambda progress: 1.0,
        "constant_with_warmup": lambda progress: 1.0,
    }[name]
    if name == "constant":
        num_warmup_steps = 0
    return LambdaLR(optimizer, partial(_factor, falling, num_warmup_steps, num_training_steps))


def _factor(
    falling: Callable[[float], float], num_warmup_steps: int, num_training_steps: int, step: int
) -> float:
    """What the rate is multiplied by before optimiser step `step`, counted from 0."""
    if step < num_warmup_steps:
        return step / num_warmup_steps
    return falling((step - num_warmup_steps) / max(1, num_training_steps - num_warmup_steps))
