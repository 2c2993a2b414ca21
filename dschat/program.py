"""How a program starts and ends: `readable_errors` surrounds every one, `run_step` a training step."""

import gc
import importlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC, EROFS
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from dschat.arguments import InspectArguments, RunDescription, StepArguments, parse_arguments
from dschat.console import messages
from dschat.console.chatter import quieten_loggers
from dschat.console.streams import log_of_streams, speak, take_over
from dschat.distributed.process_end import errors_end_ranks
from dschat.distributed.watchdog import report_lost_peers
from dschat.errors import EXIT_TRY_AGAIN, STORAGE_REMEDY, Stopped, UserError
from dschat.runs.last_lines import print_last_lines
from dschat.runs.output_folder import LOG, check_free, check_run_folder

if TYPE_CHECKING:  # torch takes seconds to import, and --help is to answer at once
    from dschat.checkpoints.checkpoint import Checkpoints
    from dschat.export.upstream import UpstreamModel


@dataclass(frozen=True)
class RunContext:
    """A step's run between its flags and its training: the calls that all steps make alike."""

    description: RunDescription

    def claim_folder(self, *models: str) -> None:
        """Make the run's folders and keep other runs out. `models` are what the run starts from.

        Raises `UserError` where the run would overwrite those, another run, or what no run wrote.
        """
        check_run_folder(self.description, *models)

    def begin(self, data: str, models: Sequence["UpstreamModel"]) -> "Checkpoints":
        """Join the process group, choose the checkpoint to go on from, if any, and seed the generators.

        `data` is the fingerprint of the data. Every rank calls it once its data are read and before a model
        is loaded. Raises `UserError` where the ranks cannot meet, or a checkpoint cannot be used.
        """
        from dschat.checkpoints.resume import begin_run
        from dschat.distributed.process_group import init_process_group
        from dschat.distributed.random_state import seed_everything

        run = self.description.run
        init_process_group(run.local_rank, host_timeout=run.host_timeout)
        checkpoints = begin_run(self.description, data=data, models=models)
        seed_everything(run.seed)
        _open_log_beside_rank_0(run.output_dir)
        return checkpoints


def _open_log_beside_rank_0(output_dir: str | None) -> None:
    """Let the other ranks of rank 0's machine, which are silent on the console, add to the log too."""
    rank, log = os.environ.get("RANK", "0"), log_of_streams()
    if output_dir and log and rank != "0" and rank == os.environ.get("LOCAL_RANK"):
        log.open(Path(output_dir) / LOG)


def run_step(step: Literal["sft", "reward", "dpo", "rlhf"], file: str) -> NoReturn:
    """Run the program of a training step, from its flags to its exit.

    `file` is the program's, in a folder of the repository. Only once the flags are known to be good, and the
    output folder to be free, it is imported, and torch with it; so --help and mistyped flags are answered at
    once. Its `main` gets the arguments and a `RunContext`.
    """
    with readable_errors():
        args = parse_arguments(step)
        assert not isinstance(args, InspectArguments)  # it trains nothing, and has no output folder
        check_free(args.run)
    with readable_errors(args.run.debug):
        _imported(file).main(args, prepare(args))
        from dschat.runs.results import copy_results  # which imports torch

        copy_results(args.run.output_dir)  # so every host has what the run has made
        print_last_lines(args.description)
        _destroy_process_group()
    sys.exit()


def _imported(file: str) -> Any:
    """Import the module of a step's program, fast.

    The garbage collector is off, and leaves what was imported out of its later passes: it would look again
    and again through millions of objects that all stay, a quarter of a start.
    transformers reads the sources of its models for their names twice, 0.3 s each: it keeps what it found by
    path, and asks for the folder of models first and then for a file in it, which here is the same.
    """
    gc.disable()
    try:
        from transformers.utils import import_utils

        if find := getattr(import_utils, name := "create_import_structure_from_path", None):
            setattr(import_utils, name, lambda path: find(path if Path(path).is_dir() else Path(path).parent))
        return importlib.import_module(f"{Path(file).resolve().parent.name}.{Path(file).stem}")
    finally:
        gc.freeze()
        gc.enable()


def prepare(arguments: StepArguments) -> RunContext:
    """Ranks, precision, foreign code, determinism. Raises `UserError` for what this machine cannot run."""
    import torch

    from dschat.distributed.device import check_precision
    from dschat.distributed.heap import give_back_large_blocks
    from dschat.distributed.mesh import set_parallel_sizes
    from dschat.distributed.rendezvous import configure_environment
    from dschat.engines.memory_remedies import memory_flags
    from dschat.engines.operators import check_operators
    from dschat.engines.out_of_memory import report_memory_with
    from dschat.models.remote_code import set_consent

    run = arguments.run
    configure_environment(run.local_rank)
    give_back_large_blocks()
    set_parallel_sizes(**arguments.parallel_sizes)
    report_memory_with(memory_flags(arguments))
    check_precision(run.dtype, run.offload)
    check_operators(run)
    set_consent(run.trust_remote_code)
    if run.deterministic:
        # cuBLAS reads this when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return RunContext(arguments.description)


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
    quieten_loggers()
    try:
        with errors_end_ranks(), _errors_reported(debug):
            yield
    except BaseException:
        speak()  # on any rank: the interpreter prints the traceback
        raise


@contextmanager
def _errors_reported(debug: bool) -> Iterator[None]:
    """The messages and exit codes of `readable_errors`."""
    number = os.environ.get("RANK", "0")
    rank = int(number) if number.isdecimal() else 0  # what else it is, `configure_environment` says
    try:
        _check_numbers()
        with _storage_errors_reported(debug):
            yield
    except KeyboardInterrupt:
        if debug:
            raise
        if rank == 0:
            messages.to_stderr("\ninterrupted")
        sys.exit(130)
    except Stopped as stop:
        if rank == 0:
            messages.to_stderr(str(stop))
        _destroy_process_group(EXIT_TRY_AGAIN)
        sys.exit(EXIT_TRY_AGAIN)
    except UserError as error:
        if debug:
            raise
        if rank != 0:
            time.sleep(15)
        prefix = "error" if rank == 0 else f"error on rank {rank}"
        messages.to_stderr(f"{prefix}: {error}")
        sys.exit(2)
    except Exception as error:
        if debug:
            raise
        # Where a rank is gone the collectives of the others fail, and a traceback of that says nothing.
        if not report_lost_peers(error):
            raise
        sys.exit(1)


def _destroy_process_group(exit_code: int = 0) -> None:
    """End the process group, and where it has several ranks the process."""
    from dschat.distributed.process_group import destroy_process_group  # which imports torch

    destroy_process_group(exit_code)


def _check_numbers() -> None:
    """Raise `UserError` where what says which process prints is no number; what is blank is not set."""
    for name in ("RANK", "WORLD_SIZE"):
        value = os.environ.get(name, "0").strip()
        if not value:
            del os.environ[name]
        elif not value.removeprefix("-").isdecimal():
            raise UserError(f"{name}={value!r} must be a whole number; correct it or unset it.")


@contextmanager
def _storage_errors_reported(debug: bool) -> Iterator[None]:
    """A full or broken disk as a `UserError`, unless `debug`."""
    try:
        yield
    except (UserError, Stopped):
        raise
    except Exception as error:  # libraries wrap the system's message
        if debug or not any(os.strerror(number) in str(error) for number in (ENOSPC, EDQUOT, EROFS)):
            raise
        raise UserError(f"nothing more can be written: {error}. {STORAGE_REMEDY}") from error
