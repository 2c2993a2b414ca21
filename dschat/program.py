"""How a program starts and ends."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC, EROFS

from dschat.arguments import StepArguments
from dschat.console import messages
from dschat.console.streams import take_over
from dschat.distributed.process_end import errors_end_ranks
from dschat.distributed.watchdog import report_lost_peers
from dschat.errors import EXIT_TRY_AGAIN, STORAGE_REMEDY, Stopped, UserError


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
    rank = int(number) if number.isdecimal() else 0  # what else it is, `configure_environment` says
    try:
        _check_numbers()
        with _storage_errors_told(debug):
            yield
    except KeyboardInterrupt:
        if debug:
            raise
        if rank == 0:
            messages.to_stderr("\ninterrupted")
        sys.exit(130)
    except Stopped as stop:
        from dschat.distributed.process_group import destroy_process_group

        if rank == 0:
            messages.to_stderr(str(stop))
        destroy_process_group(EXIT_TRY_AGAIN)
        sys.exit(EXIT_TRY_AGAIN)
    except UserError as error:
        if debug:
            raise
        if rank != 0:
            time.sleep(15)
        prefix = "error" if rank == 0 else f"error on rank {rank}"
        messages.to_stderr(f"{prefix}: {error}")
        sys.exit(2)
    except Exception:
        if debug:
            raise
        # Where a rank is gone the collectives of the others fail, and a traceback of that says nothing.
        if not report_lost_peers():
            raise
        sys.exit(1)


def _check_numbers() -> None:
    """Raise `UserError` where what says which process prints is no number; what is blank is not set."""
    for name in ("RANK", "WORLD_SIZE"):
        value = os.environ.get(name, "0").strip()
        if not value:
            del os.environ[name]
        elif not value.removeprefix("-").isdecimal():
            raise UserError(f"{name}={value!r} must be a whole number; correct it or unset it.")


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


def prepare(arguments: StepArguments) -> None:
    """Ranks, precision, foreign code, determinism. Raises `UserError` for what this machine cannot run."""
    import torch  # here, as these take seconds, and --help is to answer at once

    from dschat.distributed.device import check_precision
    from dschat.distributed.rendezvous import configure_environment
    from dschat.engines.out_of_memory import remember
    from dschat.models.remote_code import set_consent

    run = arguments.run
    configure_environment(run.local_rank)
    remember(arguments)
    check_precision(run.dtype, run.offload)
    set_consent(run.trust_remote_code)
    if run.deterministic:
        # cuBLAS reads this when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
