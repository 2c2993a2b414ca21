"""The log file of a run: what its rank 0 printed."""

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

    def __init__(self) -> None:
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
            self._file.write((line.rstrip() + "\n").encode("utf-8", errors="backslashreplace"))
