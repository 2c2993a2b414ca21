"""The log file of a run: what rank 0 printed, and what its libraries and the ranks beside it would have."""

import io
import os
import sys
from collections import deque
from contextlib import suppress
from datetime import datetime
from pathlib import Path

NUM_EARLY_LINES = 10_000
"""Lines kept until the log file is known."""


class Log:
    """The lines of both streams in a file, in UTF-8, also those printed before the file was known."""

    def __init__(self, prefix: str = "") -> None:
        """`prefix` stands before every line of a rank other than 0."""
        self._prefix = prefix
        self._early: deque[str] = deque(maxlen=NUM_EARLY_LINES)
        self._file: io.FileIO | None = None

    def open(self, path: Path) -> None:
        """Add to this file from here on; a note where it cannot be written."""
        if self._file:
            return
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            print(
                f"note: {path} cannot be written ({error.strerror}): the console alone has what is printed."
            )
            return
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        self.add(f"== {now} {Path(sys.argv[0]).name}, process {os.getpid()}")
        while self._early:
            self.add(self._early.popleft())

    def add(self, line: str) -> None:
        """A line. What finds no room on the disk is dropped."""
        if self._file is None:
            self._early.append(line)
            return
        with suppress(OSError):  # the console has the line
            line = f"{self._prefix}{line.rstrip()}\n"
            self._file.write(line.encode("utf-8", errors="backslashreplace"))


class Lines:
    """Text in pieces, added to a log as whole lines as they stand in the end: of a bar, its last state."""

    def __init__(self, log: Log) -> None:
        self._log, self._line = log, ""

    def add(self, text: str) -> None:
        """A piece."""
        *ended, last = (self._line + text).split("\n")
        for line in ended:
            self._log.add(line.rstrip("\r").rpartition("\r")[2])
        self._line = last.rpartition("\r")[2]
