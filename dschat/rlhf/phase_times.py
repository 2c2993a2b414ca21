"""The time that the phases of a PPO step take."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import record_function

from dschat.distributed.device import synchronize


class PhaseTimes:
    """Seconds of each phase of the present PPO step, those before a restart from a checkpoint included."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def reset(self) -> None:
        """Begin a PPO step."""
        self.seconds.clear()

    @contextmanager
    def measured(self, phase: str) -> Iterator[None]:
        """Add the time of the block, with what the device has still to do at its end."""
        start = time.perf_counter()
        with record_function(phase):
            yield
            synchronize()
        self.seconds[phase] += time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """Seconds of each phase."""
        return {f"seconds_{phase}": spent for phase, spent in self.seconds.items()}
