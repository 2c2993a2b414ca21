"""Ranks that share no disk, each as if on a host of its own: what they see, copy, save and go on from.

torchrun --nproc_per_node 2 two_disks.py FOLDER. Rank N works in FOLDER/disk_N, under the same relative paths
as the others, and writes what it found to FOLDER/found_N.json.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dschat.arguments import parse_arguments
from dschat.checkpoints.checkpoint import Checkpoints
from dschat.checkpoints.resume import begin_run
from dschat.checkpoints.state import Placement
from dschat.distributed import process_group, storage
from dschat.distributed.collectives import barrier
from dschat.distributed.mesh import mesh
from dschat.errors import UserError
from dschat.runs.output_folder import check_run_folder
from dschat.runs.results import copy_results


class Own:
    """A part with a tensor of each rank's own, and a value that rank 0's host alone knows."""

    def __init__(self) -> None:
        self.tensor = torch.tensor([10.0 + mesh().world.rank])

    def placement(self, key: str) -> Placement:
        return Placement.SUM

    def state_dict(self) -> dict[str, Any]:
        return {"tensor": self.tensor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tensor = state["tensor"]


def begin(*more: str, data: str = "key") -> Checkpoints:
    """A run in out/, as a step begins it."""
    flags = ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "out", "--save_interval", "1"]
    description = parse_arguments("sft", [*flags, *more]).description
    check_run_folder(description)
    return begin_run(description, data=data)


def resumed() -> dict[str, Any]:
    """Step and own tensor of a run that goes on from the latest checkpoint, or why it does not."""
    try:
        checkpoints = begin("--resume_from_checkpoint", "latest")
    except UserError as error:
        return {"error": str(error)}
    progress = checkpoints.load({})
    checkpoints._requests.release()
    own = Own()
    own.tensor = torch.zeros(1)
    progress.restore({"own": own})
    return {"step": progress.step, "tensor": own.tensor.tolist()}


def main(folder: Path) -> None:
    """Everything in turn."""
    process_group.init_process_group()
    rank = mesh().world.rank
    storage.machine_number = lambda: rank
    storage.CHUNK = 1000
    os.chdir(folder / f"disk_{rank}")
    out, found = Path("out"), {}
    out.mkdir()
    found["own disks"] = storage.storage_of(out).groups
    found["one disk"] = storage.storage_of(folder).groups
    if rank == 1:
        Path("out/deep").mkdir()
        Path("out/deep/numbers").write_bytes(bytes(range(256)) * 10)
        Path("out/empty").touch()
    lacking = ["deep/numbers", "empty", "nowhere"] if rank == 0 else []
    found["problem"] = storage.fetch(out, lacking, storage.storage_of(out))
    found["fetched"] = [path.stat().st_size for path in (out / "deep/numbers", out / "empty")]
    try:
        begin(data=f"data of rank {rank}")
    except UserError as error:
        found["other data"] = str(error)
    checkpoints = begin()
    for step in (1, 2, 3):
        checkpoints.save(step, engines={}, parts={"own": Own(), "done": step})
    found["files"] = sorted(str(path) for path in out.rglob("rank_*"))
    found["stayed"] = resumed()
    if rank == 1:
        Path("out/checkpoints/step_00000003/rank_00001.json").write_text("{}")
    found["damaged"] = resumed()
    barrier(axis="world")
    os.chdir(shutil.copytree(folder / f"disk_{1 - rank}", folder / f"moved_{rank}"))
    found["moved"] = resumed()
    if rank == 0:
        Path("out/model.safetensors").write_text("weights")
        Path("out/summary.json").write_text("{}")
    copy_results("out")
    found["results"] = sorted(path.name for path in out.iterdir() if path.is_file())
    (folder / f"found_{rank}.json").write_text(json.dumps(found, default=Tensor.tolist))
    process_group.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
