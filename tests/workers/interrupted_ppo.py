"""Runs of step 3 in one process, some of them stopped on the way.

[torchrun --nproc_per_node N] interrupted_ppo.py RUNS, a JSON file of [{"flags", ...}, ...]. After the
optimiser step "stop_after", counted over the run, rank 0 gets the signal SIGUSR1; or after step "kill_after"
the last rank is killed, unless torchrun has started it again.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from interrupted_runs import program
from processes import ROOT

from dschat.arguments import parse_arguments
from dschat.console import messages
from dschat.distributed import process_group
from dschat.distributed.mesh import mesh
from dschat.errors import Stopped
from dschat.program import prepare
from dschat.rlhf.ppo_trainer import PPOTrainer


def stopping(update: Any, stop_after: int | None, kill_after: int | None) -> Any:
    """`update` that asks its own process to stop, or kills it."""
    is_restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    is_killed = mesh().world.rank == mesh().world.size - 1 and not is_restarted

    def update_and_stop(self: PPOTrainer, minibatch: Any) -> None:
        update(self, minibatch)
        if self.num_updates == stop_after and mesh().is_main_process:
            os.kill(os.getpid(), signal.SIGUSR1)
        if self.num_updates == kill_after and is_killed:
            os.kill(os.getpid(), signal.SIGKILL)

    return update_and_stop


def main(runs: Path) -> None:
    """Run them all."""
    step3 = program("rlhf", ROOT / "step3_ppo" / "main.py")
    update = PPOTrainer.update
    for run in json.loads(runs.read_text()):
        args = parse_arguments("rlhf", run["flags"])
        PPOTrainer.update = stopping(update, run.get("stop_after"), run.get("kill_after"))
        try:
            step3.main(args, prepare(args))
            how = "finished"
        except Stopped as stop:
            how = f"stopped: {stop}"
        messages.info(f"== {args.run.output_dir} {how}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    process_group.destroy_process_group()
