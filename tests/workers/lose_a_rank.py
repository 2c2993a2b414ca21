"""Rank 1 is killed while rank 0 waits for it: in a collective, or where nothing would ever tell it.

torchrun --nproc_per_node 2 lose_a_rank.py collective|sleep|FOLDER
With a folder no rank is killed; each leaves its process number there and waits.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from dschat.distributed import collectives, process_group, watchdog
from dschat.distributed.mesh import mesh
from dschat.program import readable_errors


def main(waiting: str) -> None:
    """Lose rank 1."""
    watchdog.GRACE = 3.0
    process_group.init_process_group(int(os.environ["LOCAL_RANK"]))
    if waiting not in ("collective", "sleep"):
        Path(waiting, str(os.getpid())).touch()
    elif mesh().world.rank == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    if waiting == "collective":
        collectives.sum_across_ranks(torch.ones(1), axis="data")
    time.sleep(60)


if __name__ == "__main__":
    if sys.argv[-1] in ("collective", "sleep"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as one that waits in a collective does not hear it
    with readable_errors():
        main(sys.argv[-1])
