"""What programs print: it ends no run, whoever reads it, and steers no terminal, whatever is in it.

`take_over` puts a `Console` in the place of stdout and stderr, so print, tqdm, rich, logging and warnings all
write through it. It escapes what the encoding lacks and what moves a terminal's cursor, drops what can no
longer be written, and keeps the lines for the run's log file. On other ranks than 0 it keeps them alone.
"""

import io
import os
import re
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EBADF, EIO, EPIPE
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from dschat.console.log_file import Lines, Log
from dschat.console.text import printable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

HARMLESS = re.compile(r"\x1b\[[\d;]*m|\x1b\[\d*A")
"""Escape sequences of colours, and of tqdm where it draws several bars."""


HARMFUL = re.compile(r"\x1b(?!\[[\d;]*m|\[\d*A)")
"""The first character of any other."""


class _LastingOutput(io.RawIOBase):
    """A file descriptor whose writes always succeed: what finds no reader or no room is dropped."""

    def __init__(self, descriptor: int, log: Log) -> None:
        self._descriptor, self._log = descriptor, log

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: "ReadableBuffer") -> int:
        while True:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # another program has made the pipe or terminal non-blocking
                select.select([], [self._descriptor], [])
            except OSError as error:
                if error.errno in (EPIPE, EIO, EBADF):
                    self._give_up(error)
                return memoryview(data).nbytes

    def _give_up(self, error: OSError) -> None:
        """Nobody will read this again: libraries and child processes that write there get no error either."""
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), self._descriptor)
        self._log.add(
            f"(nobody reads descriptor {self._descriptor} any more: {error.strerror}; the run goes on)"
        )


class Console(io.TextIOWrapper):
    """stdout or stderr, whose lines also go to the run's log."""

    def __init__(self, descriptor: int, like: io.TextIOWrapper | None, log: Log) -> None:
        """With the encoding and buffering of the stream `like`."""
        self.log = log
        super().__init__(
            io.BufferedWriter(_LastingOutput(descriptor, log)),
            encoding=like.encoding if like else "utf-8",
            errors="backslashreplace",
            # Unbuffered text (PYTHONUNBUFFERED) would still wait in the buffer below it.
            line_buffering=like.line_buffering or like.write_through if like else True,
            write_through=like.write_through if like else False,
        )
        self.is_silent = _is_other_rank()
        self._lines = Lines(log)

    def write(self, text: str) -> int:
        """As a stream's; colours are left out where there is no terminal, all of it while it is silent."""
        shown = HARMFUL.sub(r"\\x1b", printable(text, "\n\t\r\x1b"))
        self._lines.add(HARMLESS.sub("", shown))
        if not self.is_silent:
            super().write(shown if self.isatty() else HARMLESS.sub("", shown))
        return len(text)


def _is_other_rank() -> bool:
    return os.environ.get("RANK", "").strip() not in ("", "0")


@contextmanager
def heard(stream: TextIO) -> Iterator[None]:
    """What is printed inside is on the console on any rank; else rank 0 alone prints, and others log."""
    if not isinstance(stream, Console):
        yield
        return
    silent, stream.is_silent = stream.is_silent, False
    try:
        yield
    finally:
        stream.is_silent = silent


def speak() -> None:
    """Let this rank print from here on, whichever it is: its program ends with an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Console):
            stream.is_silent = False


def _start_in_utf8() -> None:
    """Start this program again in Python's UTF-8 mode, unless it is; what is printed keeps its encoding.

    Libraries open files with the locale's encoding, and pass names of files on as UTF-8.
    """
    has_tried = os.environ.get("PYTHONUTF8") == "1"
    if sys.getfilesystemencoding() == "utf-8" or has_tried or sys.stdout is not sys.__stdout__:
        return
    os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding if sys.stdout else "utf-8")
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def log_of_streams() -> Log | None:
    """The log of what is printed; None where no `Console` has taken the place of stdout and stderr."""
    return next((stream.log for stream in (sys.stdout, sys.stderr) if isinstance(stream, Console)), None)


def take_over() -> None:
    """Let stdout and stderr of this program be a `Console`; streams that others have replaced stay theirs.

    Where the file system's encoding is not UTF-8 the program starts again in Python's UTF-8 mode.
    """
    _start_in_utf8()
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file to be opened would get the number, and what is printed
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    log = log_of_streams() or Log(f"[rank {os.environ['RANK']}] " if _is_other_rank() else "")
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream, original = getattr(sys, name), getattr(sys, f"__{name}__")
        if original is None:  # closed at the start; transformers puts a file of its own there
            setattr(sys, name, Console(os.open(os.devnull, os.O_WRONLY), None, log))
        elif stream is original:
            stream.flush()
            setattr(sys, name, Console(descriptor, stream, log))
