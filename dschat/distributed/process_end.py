"""The end of a process that was a rank of several, which the teardown of the interpreter must not abort.

Threads of C++ that still run then (gloo's at ZeRO-3, one inside a store's call) end the process with
"terminate called without an active exception", though its work is done.
"""

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from dschat.distributed import watchdog


def end(exit_code: int) -> NoReturn:
    """End the process after what was registered for its exit and without the interpreter's teardown."""
    try:
        atexit._run_exitfuncs()
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with suppress(OSError, ValueError):
                stream.flush()
    finally:
        os._exit(exit_code)


@contextmanager
def errors_end_ranks() -> Iterator[None]:
    """Once several ranks watch over each other, an exception ends the process where it leaves this block.

    Its exit code and traceback are the interpreter's.
    """
    try:
        yield
    except BaseException as error:
        if not watchdog.stop_watching():
            raise
        end(_exit_code(error))


def _exit_code(error: BaseException) -> int:
    """What the interpreter would end with, after what it would print."""
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        return error.code or 0
    if isinstance(error, SystemExit):
        print(error.code, file=sys.stderr)
    else:
        sys.excepthook(type(error), error, error.__traceback__)
    return 130 if isinstance(error, KeyboardInterrupt) else 1
