"""Runs of steps 1 and 2 and DPO in one process, some of them stopped on the way.

[torchrun --nproc_per_node N] interrupted_runs.py RUNS, a JSON file of [{"program", "flags", ...}]. After the
optimiser step "stop_after" rank 0 gets the signal SIGUSR1, or the program fails on the way to step "die_in".
"""

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from processes import ROOT

from dschat import distributed, supervised
from dschat.arguments import parse_arguments
from dschat.errors import Stopped
from dschat.metrics import MetricsLogger

PROGRAMS = {"sft": "step1_sft/main.py", "reward": "step2_reward/main.py", "dpo": "step2_reward/dpo.py"}


class Died(Exception):
    """What a test makes a run die of."""


def program(name: str) -> ModuleType:
    """The program as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / PROGRAMS[name])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def logger(stop_after: int | None, die_in: int | None) -> type[MetricsLogger]:
    """A logger that ends the run when it is told of a step."""

    class Ending(MetricsLogger):
        def log(self, step: int, **values: Any) -> None:
            if "loss" in values and step == die_in:
                raise Died
            if "loss" in values and step == stop_after and distributed.is_main_process():
                os.kill(os.getpid(), signal.SIGUSR1)
            super().log(step, **values)

    return Ending


def main(runs: Path) -> None:
    """Run them all."""
    programs = {name: program(name) for name in PROGRAMS}
    for run in json.loads(runs.read_text()):
        args = parse_arguments(run["program"], run["flags"])
        supervised.MetricsLogger = logger(run.get("stop_after"), run.get("die_in"))
        try:
            programs[run["program"]].main(args)
            how = "finished"
        except (Stopped, Died) as end:
            how = f"{type(end).__name__}: {end}"
        distributed.print_once(f"== {args.run.output_dir} {how}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    distributed.leave()
