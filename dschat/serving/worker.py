"""One thread that answers for a model, request after request; what waits is bounded."""

import queue
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from dschat.console import messages
from dschat.rlhf.rollout.backend import Sampling
from dschat.serving.speaker import Interrupted, Speaker, SpokenAnswer


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may take, and how many there may be."""

    tokens: int = 512
    """Of an answer."""
    length: int = 8192
    """Tokens of a prompt with its answer; a model may have room for fewer."""
    seconds: float = 120.0
    """From the request to the end of its answer."""
    waiting: int = 64
    """Requests per model that wait."""
    body: int = 2**20
    """Bytes of a request."""
    reading: float = 30.0
    """Seconds in which a request has to be there."""
    connections: int = 256


class Busy(Exception):
    """As many requests wait as may."""


class Failed(Exception):
    """The model could not answer; the message says why."""


@dataclass(eq=False)
class Job:
    """A request on its way to an answer.

    `events` gets pairs of the job's `side` and a piece of the answer's text, then the `SpokenAnswer`, or a
    `Failed`; nothing more once the job is over.
    """

    ids: list[int]
    sampling: Sampling
    seconds: float
    """From now on."""
    sample: int = 0
    stops: tuple[str, ...] = ()
    as_written: bool = False
    side: str = ""
    events: "queue.SimpleQueue[tuple[str, Any]]" = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.seconds
        self._is_cancelled = threading.Event()

    def cancel(self) -> None:
        """Nobody wants the answer any more."""
        self._is_cancelled.set()

    @property
    def is_late(self) -> bool:
        """Whether its time is up."""
        return time.monotonic() > self.deadline

    @property
    def is_over(self) -> bool:
        """Whether it is not to go on."""
        return self._is_cancelled.is_set() or self.is_late

    def hear(self, piece: str) -> None:
        """Pass a piece on; raises `Interrupted` once the job is over."""
        if self.is_over:
            raise Interrupted
        if piece:
            self.events.put((self.side, piece))


class Worker:
    """Answers jobs in the order in which they come, with one model."""

    def __init__(self, name: str, speaker: Speaker, *, most_waiting: int) -> None:
        self.name, self.speaker = name, speaker
        self._jobs: queue.Queue[Job | None] = queue.Queue(most_waiting)
        self._thread = threading.Thread(target=self._work, name=f"model {name}", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Let the job wait for its turn. Raises `Busy`."""
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise Busy from None

    def close(self) -> None:
        """End the thread after the jobs that wait, which the caller has cancelled."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not job.is_over:
                job.events.put((job.side, self._answer(job)))

    def _answer(self, job: Job) -> SpokenAnswer | Failed:
        try:
            return self.speaker.answer(
                job.ids, job.sampling, job.hear, sample=job.sample, stops=job.stops, as_written=job.as_written
            )
        except Exception as error:  # whatever it is, the next request is to be answered
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            messages.warning(f"{self.name} could not answer a prompt of {len(job.ids)} tokens: {problem}")
            return Failed(problem)
