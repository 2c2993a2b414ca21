"""How fast training is: tokens and operations per second, the share of the peak, and where time goes."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from dschat.console import messages
from dschat.distributed.device import DTYPES, current_device
from dschat.distributed.mesh import mesh
from dschat.runs.measured_choices import MeasuredChoices

SECONDS = "seconds_"
"""What stands before the name of a phase among the metrics."""
PHASES = ("data", "forward_backward", "optimizer", "evaluation", "saving")
"""What an optimiser step of steps 1, 2 and DPO consists of."""
BETWEEN_STEPS = ("evaluation", "saving")
"""Phases that are no part of a step's speed."""
SECONDS_BETWEEN_LINES = 60.0
PRODUCT = "matrix product"
"""The name under which a machine remembers the peak."""
OPERATIONS_TIMED = {"cpu": 1e9, "cuda": 1e12}
"""Operations of one timing of the peak: some milliseconds, so that one of several is not interrupted."""


class StepTimes:
    """Seconds of each phase, one after the other, without waiting for a GPU in between."""

    def __init__(self) -> None:
        self._marks: list[tuple[str, Any]] = [("", _now())]

    def end_of(self, phase: str) -> None:
        """The time since the last call was that phase's."""
        self._marks.append((phase, _now()))

    def take(self) -> dict[str, float]:
        """Seconds of each phase since this was called last; on a GPU it waits for what was begun."""
        seconds: dict[str, float] = defaultdict(float)
        if isinstance(self._marks[-1][1], torch.cuda.Event):
            self._marks[-1][1].synchronize()
        for (_, start), (phase, end) in zip(self._marks, self._marks[1:], strict=False):
            seconds[phase] += end - start if isinstance(end, float) else start.elapsed_time(end) / 1000
        self._marks = [("", self._marks[-1][1])]
        return dict(seconds)


def _now() -> Any:
    """The present moment: of a CPU's clock in seconds, on a GPU an event in the stream of its work."""
    if current_device().type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass
class Peak:
    """What one rank's device computes at most."""

    flops: float
    """FLOP/s."""
    again: Callable[[], float] | None = None
    """Times it once more, on this rank alone."""

    def share(self, flops: float) -> float:
        """The share of the peak that `flops` are, in FLOP/s.

        Where they are more, the peak was timed while others used the machine: it is timed again, once, and
        what is still more than that takes its place.
        """
        if flops > self.flops and self.again is not None:
            self.flops, self.again = max(self.flops, self.again()), None
            stands = "" if flops <= self.flops else "; the fastest step stands for it"
            more = f"a step computed {flops / 1e12:.3g} TFLOP/s, so the peak was timed again"
            messages.info(f"peak: {more}: {self.flops / 1e12:.3g}{stands}")
        self.flops = max(self.flops, flops)
        return flops / self.flops


class SpeedReport:
    """The figures of speed of each step, and now and then a line of them on the console."""

    def __init__(self, peak: Peak, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._peak, self._clock = peak, clock
        self._last_line = clock()
        self._totals: dict[str, float] = defaultdict(float)
        self._seconds: dict[str, float] = defaultdict(float)

    def figures(self, *, tokens: float, flops: float, seconds: Mapping[str, float]) -> dict[str, float]:
        """The metrics of one step: `tokens` and `flops` over all ranks, `seconds` by phase.

        Evaluation and saving are no part of the time that the rates are of.
        """
        spent = sum(value for phase, value in seconds.items() if phase not in BETWEEN_STEPS)
        for name, value in (("tokens", tokens), ("flops", flops), ("seconds", spent)):
            self._totals[name] += value
        for phase, value in seconds.items():
            self._seconds[phase] += value
        return {
            **{SECONDS + phase: value for phase, value in seconds.items()},
            "tokens_per_second": tokens / spent,
            "flops_per_second": flops / spent,
            "peak_share": self._peak.share(flops / spent / mesh().world.size),
        }

    def print_now_and_then(self, step: int, *, is_last: bool = False) -> None:
        """One line of the steps since the last line, where that is a minute ago or the run ends."""
        if not self._totals["seconds"] or (
            self._clock() - self._last_line < SECONDS_BETWEEN_LINES and not is_last
        ):
            return
        tokens, flops = (self._totals[name] / self._totals["seconds"] for name in ("tokens", "flops"))
        share = self._peak.share(flops / mesh().world.size)
        whole = sum(self._seconds.values())
        phases = ", ".join(
            f"{phase.replace('_', ' and ')} {value / whole:.0%}" for phase, value in self._seconds.items()
        )
        messages.info(
            f"step {step}: {tokens:,.0f} tokens/s, {flops / 1e12:.3g} TFLOP/s, {share:.0%} of the peak; "
            f"time: {phases}"
        )
        self._last_line = self._clock()
        self._totals.clear()
        self._seconds.clear()


def measured_peak(config: Any, dtype: str, *, num_tokens: int, choices: MeasuredChoices) -> Peak:
    """The peak of this machine in the largest product of the model's layers with about `num_tokens` tokens.

    Said in one line. A machine keeps the highest that it has seen for a shape and precision, and looks again
    each week. `config` is the model's, `dtype` as in --dtype. Every rank must call it.
    """
    device, (rows, width, wide) = current_device(), _product(config, num_tokens)
    operations = 2 * rows * width * wide
    times = max(1, int(OPERATIONS_TIMED.get(device.type, 1e10) / operations))
    key = {"rows": rows, "width": width, "wide": wide, "dtype": dtype, "times": times}

    @torch.no_grad()
    def flops(*, alone: bool) -> float:
        generator = torch.Generator(device).manual_seed(0)  # the run's own generator is left as it is
        a, b = (
            torch.randn(shape, generator=generator, device=device).to(DTYPES[dtype])
            for shape in ((rows, width), (wide, width))
        )

        def multiply() -> None:
            for _ in range(times):
                linear(a, b)

        return times * operations / choices.seconds_of(PRODUCT, multiply, key=key, alone=alone)

    peak = Peak(flops(alone=False), lambda: flops(alone=True))
    shape = f"{rows} x {width} x {wide}"
    messages.info(f"peak: {peak.flops / 1e12:.3g} TFLOP/s on this machine, in {dtype} products of {shape}")
    return peak


def _product(config: Any, num_tokens: int) -> tuple[int, int, int]:
    """Rows, width and columns of the largest product of a model's layers with about so many tokens."""
    config = config.get_text_config()
    width, rows = config.hidden_size, 2 ** min(13, max(8, (num_tokens - 1).bit_length()))
    names = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
    wide = next((size for size in (getattr(config, name, None) for name in names) if size), 4 * width)
    return rows, width, wide
