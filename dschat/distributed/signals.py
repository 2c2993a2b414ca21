"""Requests to stop: SIGTERM, SIGUSR1 (Slurm's pre-emption), SIGHUP (a closed terminal) and Ctrl-C.

A run obeys them after its step. What was ignored when it started, as nohup does with SIGHUP, stays ignored.
"""

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

FORWARDED_AT_ONCE = 1.0
"""Seconds: torchrun passes a Ctrl-C on that its processes have already got from the terminal."""


class StopRequests:
    """Notes the first request; a second Ctrl-C stops at once. Listens between `listen` and `release`."""

    def __init__(self, when_asked: Callable[[], None] = lambda: None) -> None:
        """`when_asked` is called in the handler of the first signal."""
        self.received: str | None = None
        """The name of the signal that asked for an end."""
        self._time = 0.0
        self._when_asked = when_asked
        self._before: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Take over the signals; only a program's main thread may."""
        heard = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heard}

    def release(self) -> None:
        """Give the signals back, so that they end the program as usual."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        if name == "SIGINT" and self.received == "SIGINT" and now - self._time > FORWARDED_AT_ONCE:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self._time = name, now
            self._when_asked()
