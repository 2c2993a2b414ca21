"""Programs in processes that are forked from one that has imported the large libraries, which takes 3 s.

Such a process differs from one that a user starts in its imports, which are done, and in the seed of Python's
hashes, which it has in common with all others of the test's own process.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest import mock

LIBRARIES = ["torch", "deepspeed", "datasets", "transformers.models.llama.modeling_llama", "peft"]
LIBRARIES += [
    "transformers.models.auto.modeling_auto",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "rich.table",
]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([*LIBRARIES, __name__])
IMPORT_PATH = sys.path[1:]
"""In a forked process: where the server imports from."""
GRACE = 30
"""Seconds from SIGTERM to SIGKILL, as torchrun has them."""


def run_program(argv: list[str], env: dict[str, str], cwd: Path, outputs: list[str]) -> None:
    """Be `python ARGV` with this environment, working directory and files for stdout and stderr."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    script, sys.argv = argv[0], argv
    sys.path[:] = [str(Path(script).resolve().parent), *IMPORT_PATH]
    try:
        runpy.run_path(script, run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()


def rank_variables(rank: int, ranks: int, port: int, run_id: str) -> dict[str, str]:
    """What torchrun sets for one of the ranks of a machine that meet in its own store."""
    return {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"},
        **{"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)},
        **{"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": run_id},
        **{"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"},
    }


def end(processes: list[ForkServerProcess]) -> None:
    """SIGTERM, then SIGKILL."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
        process.kill()
        process.join()


def wait_for(processes: list[ForkServerProcess], timeout: float) -> None:
    """Wait until all have ended, or one has failed, which ends the others. Raises `TimeoutError`."""
    deadline = time.monotonic() + timeout
    while running := [process for process in processes if process.exitcode is None]:
        if not wait([process.sentinel for process in running], deadline - time.monotonic()):
            raise TimeoutError(f"still running after {timeout} s")
        if any(process.exitcode for process in processes):
            break


def run(
    argv: list[str], ranks: int, env: dict[str, str], cwd: Path, timeout: float
) -> subprocess.CompletedProcess:
    """`processes.python` in forked processes."""
    with mock.patch.dict(os.environ, env, clear=True):
        forkserver.ensure_running()
    with contextlib.ExitStack() as stack:
        variables = [{}]
        if ranks > 1:
            from torch.distributed import TCPStore  # not for tests that need none

            store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            run_id = str(uuid.uuid4())
            variables = [rank_variables(rank, ranks, store.port, run_id) for rank in range(ranks)]
        files = [stack.enter_context(tempfile.NamedTemporaryFile()) for _ in ("stdout", "stderr")]
        outputs = [file.name for file in files]
        processes = [
            CONTEXT.Process(target=run_program, args=(argv, env | own, cwd, outputs)) for own in variables
        ]
        stack.callback(end, processes)
        for process in processes:
            process.start()
        wait_for(processes, timeout)
        end(processes)
        codes = [process.exitcode for process in processes]
        said = [Path(output).read_text(encoding="utf-8") for output in outputs]
    return subprocess.CompletedProcess(argv, codes[0] if ranks == 1 else int(any(codes)), *said)
