"""Several runs of step2_reward/dpo.py in one process, to start it once.

[torchrun --nproc_per_node N] dpo_runs.py RUNS, a JSON file of {name: flags}. Before each run it prints
"== NAME", and when training begins how much is left of the weights that were loaded to be frozen.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from processes import ROOT

from dschat.arguments import parse_arguments
from dschat.console import messages
from dschat.distributed import process_group
from dschat.engines.build import build_frozen_engine
from dschat.engines.step import DeepSpeedEngine
from dschat.program import prepare
from dschat.supervised import reference_logprobs
from dschat.supervised import run as supervised_run


def program() -> ModuleType:
    """The program as a module."""
    spec = importlib.util.spec_from_file_location("dpo", ROOT / "step2_reward" / "dpo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(runs: Path) -> None:
    """Run them all."""
    dpo = program()
    train, weights = supervised_run.train_epochs, []

    def build_and_watch(*args: Any, **settings: Any) -> DeepSpeedEngine:
        engine = build_frozen_engine(*args, **settings)
        for parameter in engine.parameters():
            weights.extend(
                weight for weight in (parameter, getattr(parameter, "ds_tensor", None)) if weight is not None
            )
        return engine

    def look_and_train(*args: Any, **settings: Any) -> dict[str, float]:
        left = sum(weight.untyped_storage().nbytes() for weight in weights)
        messages.info(f"{len(weights)} weights of the reference model have {left} bytes")
        weights.clear()
        return train(*args, **settings)

    reference_logprobs.build_frozen_engine, supervised_run.train_epochs = build_and_watch, look_and_train
    for name, flags in json.loads(runs.read_text()).items():
        messages.info(f"== {name}")
        args = parse_arguments("dpo", flags)
        dpo.main(args, prepare(args))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    process_group.destroy_process_group()
