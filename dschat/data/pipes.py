"""Pipes, such as /dev/fd/63 of `<(zcat rows.jsonl.gz)`: read once, into a file without a name."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import BinaryIO

from dschat.console import messages
from dschat.errors import UserError


def is_pipe(path: Path) -> bool:
    """Whether a path can be read once only: a pipe, a terminal, a device."""
    return path.is_fifo() or path.is_char_device()


_SPOOLED: dict[Path, BinaryIO] = {}


def spooled(path: Path, flag: str) -> BinaryIO:
    """What comes out of the pipe, in a temporary file without a name that ends with the process.

    Raises `UserError` where several processes would have to read it.
    """
    if path in _SPOOLED:
        return _SPOOLED[path]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            f"{flag} {path}: a pipe can be read by one process only, and this run has "
            f"{os.environ['WORLD_SIZE']}; write the rows into a file."
        )
    file = _SPOOLED[path] = tempfile.TemporaryFile()  # noqa: SIM115 - it is open as long as the process
    with path.open("rb") as pipe:
        shutil.copyfileobj(pipe, file)
    file.flush()
    if file.tell() == 0:
        raise UserError(
            f"{flag} {path}: the pipe is empty. It can be read once only, so a run that starts again or goes "
            "on needs the rows in a file."
        )
    messages.note(f"{flag} {path} is a pipe and was read once ({file.tell()} bytes).")
    return file
