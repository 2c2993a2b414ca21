"""How fast a device is, in the few numbers that a plan's seconds are made of; measured once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dschat.distributed.device import DTYPES, current_device
from dschat.engines.speed import peak_of
from dschat.runs.measured_choices import MeasuredChoices

COPIED = {"cpu": 2**25, "cuda": 2**28}
"""fp32 numbers that a copy moves: more than a CPU's caches hold."""
STEPPED = {"cpu": 2**23, "cuda": 2**26}
"""Weights that an optimiser step changes."""
STARTED = 200
"""Operations whose start is timed together."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The speed of one device."""

    flops_per_second: float
    """Of matrix products."""
    bytes_per_second: float
    """Read and written, of memory."""
    overhead: float
    """Seconds to start an operation."""
    seconds_per_weight: float
    """Of a step of AdamW, in fp32."""


class _Trials:
    """What is timed; tensors are made with the first call, which is not timed."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._device, self._dtype = current_device(), dtype

    @cached_property
    def _pair(self) -> tuple[Tensor, Tensor]:
        numbers = torch.ones(COPIED[self._device.type], device=self._device)
        return numbers, numbers.clone()

    @cached_property
    def _numbers(self) -> Tensor:
        return torch.zeros(16, device=self._device, dtype=self._dtype)

    @cached_property
    def _optimizer(self) -> torch.optim.Optimizer:
        weights = torch.nn.Parameter(torch.ones(STEPPED[self._device.type], device=self._device))
        weights.grad = torch.ones_like(weights)
        return torch.optim.AdamW([weights], fused=True)

    def copy(self) -> None:
        """Move memory."""
        target, source = self._pair
        target.copy_(source)

    def start(self) -> None:
        """Start operations that do next to nothing."""
        for _ in range(STARTED):
            self._numbers.add_(1)

    def step(self) -> None:
        """Take an optimiser step."""
        self._optimizer.step()


def rates_of(
    config: Any, dtype: str, *, num_tokens: int, choices: MeasuredChoices, measures: bool
) -> Rates | None:
    """The rates of this device, as the machine remembers them or, with `measures`, measured in some seconds.

    `config` is that of the model and `num_tokens` the tokens of a micro-batch: matrix products are timed in
    their shapes. None where one is not remembered and `measures` is False. Every rank must call it.
    """
    trials, kind = _Trials(DTYPES[dtype]), current_device().type

    def seconds(name: str, run: Callable[[], None], **key: Any) -> float | None:
        if measures:
            return choices.seconds_of(name, run, key=key)
        return choices.remembered_seconds(name, key=key)

    peak = peak_of(config, dtype, num_tokens=num_tokens, choices=choices, measures=measures)
    copied = seconds("memory copy", trials.copy, size=COPIED[kind])
    started = seconds("start of an operation", trials.start, times=STARTED, dtype=dtype)
    stepped = seconds("AdamW", trials.step, size=STEPPED[kind])
    if peak is None or copied is None or started is None or stepped is None:
        return None
    return Rates(
        flops_per_second=peak,
        bytes_per_second=8 * COPIED[kind] / copied,
        overhead=started / STARTED,
        seconds_per_weight=stepped / STEPPED[kind],
    )
