"""Errors a person can act on, and how a program shows them."""

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC, EROFS

from dschat.console import printable, take_over
from dschat.ending import errors_end_ranks
from dschat.peers import report_lost_peers

LONGEST_MESSAGE = 2000


class UserError(ValueError):
    """The input cannot work. The message names the flag or the file and line, the value, and the remedy.

    It quotes what files and libraries say, so it is made one readable line here. Further `details` are a line
    each, with the spaces in front of them.
    """

    def __init__(self, message: str, *details: str) -> None:
        super().__init__(one_line(message), *(_indent(line) + one_line(line) for line in details))

    def __str__(self) -> str:
        return "\n".join(self.args)


def one_line(message: str) -> str:
    """The message in one line; the middle is left out of one with more than `LONGEST_MESSAGE` characters.

    Control characters are escaped, as a file's content must not steer the terminal.
    """
    line = printable(re.sub(r"\s*\n\s*", " ", message.strip()), keep="")
    if len(line) <= LONGEST_MESSAGE:
        return line
    half = LONGEST_MESSAGE // 2 - 25
    return f"{line[:half]} ... ({len(line) - 2 * half:,} characters) ... {line[-half:]}"


def _indent(line: str) -> str:
    return " " * (len(line) - len(line.lstrip(" ")))


EXIT_TRY_AGAIN = 75
"""EX_TEMPFAIL of sysexits.h: a run that was asked to stop and can go on from its checkpoint."""


class Stopped(Exception):
    """The run was asked to stop and has; the message says what is kept. Every rank raises it."""


@contextmanager
def readable_errors(debug: bool = False) -> Iterator[None]:
    """End the program with one message, on one rank, and exit code 2 when a `UserError` is raised inside.

    Every rank checks its own input, so all of them usually fail alike. Rank 0 speaks at once; the others wait
    for the launcher to end them, and speak only if it does not, as they then are the ones that failed.
    A full or broken disk counts as one. With `debug` the traceback is left alone. Any other error is a bug
    and keeps its traceback, except that of a collective that failed because another rank is gone: then the
    exit code is 1. A run that was asked to stop ends with exit code 75.

    What is printed goes through a `Console` from here on. Where several ranks run, an error ends their watch
    over each other before the process.
    """
    take_over()
    with errors_end_ranks(), _errors_told(debug):
        yield


@contextmanager
def _errors_told(debug: bool) -> Iterator[None]:
    """What `readable_errors` says of errors."""
    number = os.environ.get("RANK", "0")
    rank = int(number) if number.isdecimal() else 0  # what else it is, `settle_environment` says
    try:
        _check_numbers()
        with _storage_errors_told(debug):
            yield
    except KeyboardInterrupt:
        if debug:
            raise
        if rank == 0:
            print("\ninterrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except Stopped as stop:
        from dschat.distributed import leave  # which imports torch, as has been done where a run can stop

        if rank == 0:
            _tell(str(stop))
        leave(EXIT_TRY_AGAIN)
        sys.exit(EXIT_TRY_AGAIN)
    except UserError as error:
        if debug:
            raise
        if rank != 0:
            time.sleep(15)
        prefix = "error" if rank == 0 else f"error on rank {rank}"
        _tell(f"{prefix}: {error}")
        sys.exit(2)
    except Exception:
        if debug:
            raise
        # Where a rank is gone the collectives of the others fail, and a traceback of that says nothing.
        if not report_lost_peers():
            raise
        sys.exit(1)


def _tell(message: str) -> None:
    """Print the last message of a program, in lines of its own where a progress bar has not ended."""
    from tqdm import tqdm  # not before a program has something to tell: --help is to answer at once

    tqdm.write(message, file=sys.stderr)
    sys.stderr.flush()


def _check_numbers() -> None:
    """Raise `UserError` where what says which process prints is no number; what is blank is not set."""
    for name in ("RANK", "WORLD_SIZE"):
        value = os.environ.get(name, "0").strip()
        if not value:
            del os.environ[name]
        elif not value.removeprefix("-").isdecimal():
            raise UserError(f"{name}={value!r} must be a whole number; correct it or unset it.")


STORAGE_REMEDY = (
    "Make room or repair the disk; a run with checkpoints goes on with --resume_from_checkpoint latest."
)


@contextmanager
def _storage_errors_told(debug: bool) -> Iterator[None]:
    """A full or broken disk as a `UserError`, unless `debug`."""
    try:
        yield
    except (UserError, Stopped):
        raise
    except Exception as error:
        if debug or not _is_about_storage(error):
            raise
        raise UserError(f"nothing more can be written: {error}. {STORAGE_REMEDY}") from error


def _is_about_storage(error: Exception) -> bool:
    """Whether the disk is full, or cannot be written any more; libraries wrap the system's message."""
    return any(os.strerror(number) in str(error) for number in (ENOSPC, EDQUOT, EROFS))
