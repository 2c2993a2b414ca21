"""Scores from a Python function of the user's, in a process that a bad answer may hang or kill."""

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

from dschat.errors import UserError
from dschat.rlhf.rewards.text_answers import Problem, Score, TextAnswers

WORKER = Path(__file__).with_name("function_worker.py")
SECONDS_TO_START = 300.0
"""A file may import a large library."""
GRACE = 5.0
"""Seconds that a worker has to end itself after its time is up, before it is killed."""
SECONDS_BETWEEN_LOOKS = 0.5
"""Pause between checks of whether a silent worker still lives."""
MAX_LOST_WORKERS = 8
"""Hung or dead workers of one rollout batch and rank after which its other answers are not tried."""


class RewardFunction:
    """`FILE.py:NAME`, called with at most `batch_size` answers and `seconds` of time.

    A batch that fails is scored again answer by answer, so that only the bad ones have no score. Raises
    `UserError` where the file cannot be loaded or the function needs columns that the data does not have.
    """

    def __init__(
        self, spec: str, *, batch_size: int, seconds: float, available: tuple[str, ...] = ()
    ) -> None:
        path, _, self.name = spec.rpartition(":")
        self._spec, self._path = spec, str(Path(path).expanduser().resolve())
        self._batch_size, self._seconds = batch_size, seconds
        self._num_lost = 0
        if not Path(self._path).is_file():
            raise UserError(
                f"--reward_function {spec}: there is no file {path!r}, seen from {Path.cwd()}; correct the "
                "path."
            )
        self._worker: _Worker | None
        self._worker, self._columns, required = self._start()
        missing = [name for name in required if name not in available]
        if missing:
            raise UserError(
                f"--reward_function {spec} needs the column {missing[0]!r}, which the data does not have "
                f"(its columns: {', '.join(available) or 'none'}); give it a default, or other data."
            )

    def _start(self) -> tuple["_Worker", list[str] | None, list[str]]:
        """A new worker, the columns that the function takes (None for all), and those that it needs.

        Raises `UserError` where the file cannot be loaded.
        """
        worker = _Worker([sys.executable, str(WORKER), self._path, self.name, str(self._seconds)])
        reply, _ = worker.reply(SECONDS_TO_START)
        if reply is None:
            reply = {"problem": ["", "the process ended, or took too long, while it was loaded"]}
        if "problem" in reply:
            raise UserError(f"--reward_function {self._spec}: {reply['problem'][1]}. Correct the file.")
        return worker, reply["columns"], reply["required"]

    def score(self, answers: TextAnswers) -> list[Score]:
        """Each answer's score, or what went wrong. Raises `UserError` where no worker can be started."""
        self._num_lost = 0
        return [score for batch in answers.batches(self._batch_size) for score in self._score_batch(batch)]

    def _score_batch(self, batch: TextAnswers) -> list[Score]:
        scores = self._ask(batch)
        if isinstance(scores, list):
            return scores
        if len(batch) == 1:
            return [scores]
        return [score for one in batch.batches(1) for score in self._score_batch(one)]

    def _ask(self, batch: TextAnswers) -> list[Score] | Problem:
        if self._num_lost >= MAX_LOST_WORKERS:
            text = f"not tried, as the function had hung or died {self._num_lost} times in this PPO step"
            return Problem("not tried", text)
        if self._worker is None or not self._worker.is_alive():
            self._worker, self._columns, _ = self._start()
        names = batch.columns if self._columns is None else self._columns
        columns = {name: batch.columns[name] for name in names if name in batch.columns}
        self._worker.request({"prompts": batch.prompts, "answers": batch.answers, "columns": columns})
        reply, last_words = self._worker.reply(self._seconds + GRACE)
        if reply is None:
            self._num_lost += 1
            worker, self._worker = self._worker, None
            return self._what_ended(worker.end(), last_words)
        if "problem" in reply:
            return Problem(*reply["problem"])
        problems = {int(place): Problem(*problem) for place, problem in reply["problems"].items()}
        return [problems.get(place, score) for place, score in enumerate(reply["scores"])]

    def _what_ended(self, code: int | None, last_words: str) -> Problem:
        """Why a worker ended, by its exit code as `_Worker.end` gives it and by what it wrote at last."""
        if "Timeout (" in last_words or code is None:
            frame = re.search(rf'File "{re.escape(self._path)}", line (\d+)', last_words)
            place = f" ({Path(self._path).name}:{frame[1]})" if frame else ""
            return Problem("hangs", f"no score after {self._seconds:g} s (--reward_timeout){place}")
        if code < 0:
            return Problem(f"signal {-code}", f"its process died of {signal.Signals(-code).name}")
        return Problem("exit", f"its process ended with exit code {code}")


class _Worker:
    """A `function_worker.py`; it ends with this object."""

    def __init__(self, command: list[str]) -> None:
        # In a session of its own, so that Ctrl-C reaches the run alone, and that what it starts ends with it.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        self._received = b""
        self._end = weakref.finalize(self, _end, self._process)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def request(self, content: dict[str, Any]) -> None:
        """Send a request; that the worker is gone shows when the reply is awaited."""
        with contextlib.suppress(BrokenPipeError):
            self._requests.write(json.dumps(content).encode() + b"\n")
            self._requests.flush()

    def reply(self, seconds: float) -> tuple[dict[str, Any] | None, str]:
        """The reply that comes next; without one None, and what the worker wrote before it ended, if so."""
        deadline, pipe = time.monotonic() + seconds, self._replies.fileno()
        while True:
            line, newline, rest = self._received.partition(b"\n")
            if newline and line.startswith(b"{"):
                self._received = rest
                return json.loads(line), ""
            left, may_write = max(deadline - time.monotonic(), 0), self.is_alive()
            ready, _, _ = select.select([pipe], [], [], min(left, SECONDS_BETWEEN_LOOKS))
            some = os.read(pipe, 1 << 16) if ready else b""
            # What it has forked may hold the pipe open when it is gone.
            if not some and (ready or left == 0 or not may_write):
                return None, self._received.decode(errors="replace")
            self._received += some

    def end(self) -> int | None:
        """End it; returns its exit code, negative for a signal, or None where it had to be ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=0.5)  # its pipe is closed a moment before it has ended
        code = self._process.poll()
        self._end()
        return code


def _end(process: subprocess.Popen) -> None:
    """End a worker and what it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()
