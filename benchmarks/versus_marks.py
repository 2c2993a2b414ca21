"""The moments of a run's steps, and what benchmarks/versus.py reads of them: one JSON object, a line at the
end.

Every run that versus.py starts, ours and the peers', imports this file: it needs nothing but Python.
"""

import json
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STARTED = "VERSUS_STARTED"
"""The environment variable with the time of day at which versus.py started the command."""


@dataclass
class Marks:
    """`step(samples, tokens)` after each optimiser step (PPO: after each batch of answers), then `report`."""

    num_left_out: int
    """The first steps, which are not timed: they allocate memory and build kernels."""
    moments: list[tuple[float, float]] = field(default_factory=list)
    """The time of day and the processor time of the process, in seconds, at the end of each step."""
    samples: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """Those that are not padding."""
    peak_mib: float = 0.0

    def step(self, samples: int, tokens: int = 0) -> None:
        """A step is done that learned from so many samples of so many tokens."""
        self.moments.append((time.time(), time.process_time()))
        self.samples.append(samples)
        self.tokens.append(tokens)
        self.peak_mib = peak_mib()

    def report(self, **more: Any) -> dict[str, Any]:
        """What versus.py reads. Raises `ValueError` where no step is left to be timed."""
        first = self.num_left_out
        if len(self.moments) <= first:
            raise ValueError(f"{len(self.moments)} steps were taken and the first {first} are not timed")
        begin, end = self.moments[first - 1], self.moments[-1]
        samples, tokens = sum(self.samples[first:]), sum(self.tokens[first:])
        seconds, cpu_seconds = end[0] - begin[0], end[1] - begin[1]
        started = os.environ.get(STARTED)
        return {
            "samples_per_second": samples / seconds,
            "samples_per_cpu_second": samples / cpu_seconds,
            "tokens_per_second": tokens / seconds,
            "steps": len(self.moments) - first,
            "samples": samples,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "first_step_seconds": self.moments[0][0] - float(started) if started else None,
            "training_peak_mib": self.peak_mib,
            "peak_mib": peak_mib(),
            **more,
        }


def peak_mib() -> float:
    """The most memory that this process has held so far, in MiB (Linux: VmHWM, which a parent's past does
    not raise; elsewhere ru_maxrss)."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def say(report: dict[str, Any]) -> None:
    """Print the line, whatever has taken over stdout."""
    os.write(1, f"\n{json.dumps(report)}\n".encode())


def last_json_line(output: str) -> dict[str, Any]:
    """The last line of a program's output that is a JSON object. Raises `ValueError` where there is none."""
    for line in reversed(output.splitlines()):
        if line.lstrip().startswith("{"):
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(found, dict):
                return found
    raise ValueError("its output has no line that is a JSON object")


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle."""
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
