"""Runs of steps 1 and 2 and DPO in one process, some of them stopped on the way.

[torchrun --nproc_per_node N] interrupted_runs.py RUNS, a JSON file of [{"program", "flags", ...}]. After the
optimiser step "stop_after" the last rank gets the signal SIGUSR1; or the program fails on the way to step
"die_in"; the disk is full for the last rank after step "full_after", and that step alone; or the last rank is
killed on the way to step "kill_in", unless torchrun has started it again.
"""

import errno
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from processes import ROOT

from dschat.arguments import parse_arguments
from dschat.checkpoints import engine_state
from dschat.console import messages
from dschat.distributed import process_group
from dschat.distributed.mesh import mesh
from dschat.errors import Stopped
from dschat.program import prepare
from dschat.runs.metrics import MetricsLogger
from dschat.supervised import loop

PROGRAMS = {"sft": "step1_sft/main.py", "reward": "step2_reward/main.py", "dpo": "step2_reward/dpo.py"}


SAVE = torch.save


def no_room(*args: Any) -> None:
    """What a full disk does."""
    raise OSError(errno.ENOSPC, "No space left on device")


class Died(Exception):
    """What a test makes a run die of."""


def program(name: str, path: Path) -> ModuleType:
    """The program as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def logger(run: dict[str, Any]) -> type[MetricsLogger]:
    """A logger that does to the run what it is to suffer, when it is told of a step."""
    is_restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    is_last_rank = mesh().world.rank == mesh().world.size - 1

    class Ending(MetricsLogger):
        def log(self, step: int, values: Mapping[str, float]) -> None:
            if "loss" in values and step == run.get("die_in"):
                raise Died
            if "loss" in values and step == run.get("stop_after") and is_last_rank:
                os.kill(os.getpid(), signal.SIGUSR1)
            if "loss" in values and step == run.get("kill_in") and is_last_rank and not is_restarted:
                os.kill(os.getpid(), signal.SIGKILL)
            if is_last_rank:
                engine_state.torch.save = no_room if step == run.get("full_after") else SAVE
            super().log(step, values)

    return Ending


def main(runs: Path) -> None:
    """Run them all."""
    programs = {name: program(name, ROOT / path) for name, path in PROGRAMS.items()}
    for run in json.loads(runs.read_text()):
        args = parse_arguments(run["program"], run["flags"])
        loop.MetricsLogger = logger(run)
        try:
            programs[run["program"]].main(args, prepare(args))
            how = "finished"
        except (Stopped, Died) as end:
            how = f"{type(end).__name__}: {end}"
        messages.info(f"== {args.run.output_dir} {how}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    process_group.destroy_process_group()
