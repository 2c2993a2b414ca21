"""Messages of a run to its user: printed by rank 0, on a line of their own also beside a progress bar.

The run's log file has them too, as `console.streams` puts a `Console` in the place of stdout and stderr.
"""

import os
import sys
from typing import TextIO

from dschat.console.streams import heard


def info(message: str, *, every_rank: bool = False) -> None:
    """Print a message without a level. Only rank 0 does, unless `every_rank`."""
    if every_rank or os.environ.get("RANK", "0") == "0":
        _write(message, sys.stdout)


def note(message: str, *, every_rank: bool = False) -> None:
    """Print what the user may want to know: "note: " and the message."""
    info(f"note: {message}", every_rank=every_rank)


def warning(message: str, *, every_rank: bool = False) -> None:
    """Print what probably is not as the user wants it: "WARNING: " and the message."""
    info(f"WARNING: {message}", every_rank=every_rank)


def to_stderr(message: str) -> None:
    """Print to stderr, on the rank that calls this: why a program ends, or what other ranks wait for."""
    _write(message, sys.stderr)


def _write(message: str, stream: TextIO) -> None:
    from tqdm import tqdm  # not before a program has something to print: --help is to answer at once

    with heard(stream), tqdm.external_write_mode(file=stream):
        stream.write(f"{message}\n")
        stream.flush()  # before the bars are drawn again
