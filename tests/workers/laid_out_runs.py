"""Several runs of the steps in one process, to start it once.

[torchrun --nproc_per_node N] laid_out_runs.py RUNS, a JSON file of {name: [step, flags]}.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

from processes import ROOT

from dschat.arguments import parse_arguments
from dschat.console import messages
from dschat.distributed import process_group
from dschat.program import prepare

PROGRAMS = {
    "sft": "step1_sft/main.py",
    "reward": "step2_reward/main.py",
    "dpo": "step2_reward/dpo.py",
    "rlhf": "step3_ppo/main.py",
}


def program(step: str) -> ModuleType:
    """The program as a module."""
    spec = importlib.util.spec_from_file_location(step, ROOT / PROGRAMS[step])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(runs: Path) -> None:
    """Run them all."""
    for name, (step, flags) in json.loads(runs.read_text()).items():
        messages.info(f"== {name}")
        args = parse_arguments(step, flags)
        program(step).main(args, prepare(args))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    process_group.destroy_process_group()
