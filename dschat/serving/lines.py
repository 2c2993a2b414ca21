"""A file of JSON lines that people add to: a line is there whole, and on the disk, or not at all."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from dschat.console import messages
from dschat.errors import UserError


def append_line(path: Path, value: Any) -> None:
    """Add a line, and wait until the disk has it. Other processes may add to the file at the same time.

    A part of a line at the file's end, which a crash left, is cut off with a warning. Raises `OSError` where
    the line cannot be written, and leaves the file as it was.
    """
    line = (json.dumps(value, ensure_ascii=False) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = _size_of_lines(descriptor, path)
        try:
            written = 0
            while written < len(line):
                written += os.write(descriptor, line[written:])
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def _size_of_lines(descriptor: int, path: Path) -> int:
    """The file's size, once it ends with a whole line."""
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return size
    whole = path.read_bytes().rfind(b"\n") + 1
    tail = os.pread(descriptor, size - whole, whole)
    try:
        json.loads(tail)
    except ValueError:
        messages.warning(f"{path} ended in a part of a line, {len(tail)} bytes, which is cut off.")
        os.ftruncate(descriptor, whole)
        return whole
    os.write(descriptor, b"\n")  # a line that somebody wrote without its end
    return size + 1


def last_line(path: Path) -> Any:
    """The value of the file's last line. Raises `UserError` where there is none that can be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return json.loads(lines[-1])
    except (OSError, ValueError, IndexError, RecursionError) as error:
        raise UserError(f"{path} has no last line of JSON ({type(error).__name__}: {error}).") from error
