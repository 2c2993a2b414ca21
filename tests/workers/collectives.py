"""What each collective of dschat.distributed gives on this rank, as JSON a rank.

torchrun --nproc_per_node 2 collectives.py OUTPUT_FOLDER
"""

import json
import sys
from pathlib import Path

import torch

from dschat.distributed import collectives, process_group
from dschat.distributed.mesh import mesh, set_parallel_sizes
from dschat.distributed.statistics import MeanOverRanks


def main(folder: Path) -> None:
    """Run them all on numbers that differ by rank."""
    device = process_group.init_process_group()
    rank = mesh().world.rank
    mine = torch.tensor([1.0, 10.0], device=device) * (rank + 1)
    results = {
        "sum": collectives.sum_across_ranks(mine, axis="data").tolist(),
        "max": collectives.max_across_ranks(-mine, axis="data").tolist(),
        "largest": collectives.largest_across_ranks(5 - rank, device, axis="data"),
        "gathered": collectives.gather_rows(mine.unsqueeze(0), axis="data").tolist(),
        "flags": collectives.gather_rows(torch.tensor([rank == 0]), axis="data").tolist(),
        "texts": collectives.all_gather_object("né" * (2 * rank) + str(rank), axis="world"),
        "broadcast": collectives.broadcast_from_rank_0(lambda: {"rank": rank}),
        "standard_error": standard_error_over_ranks(rank, device),
        "is_main": mesh().is_main_process,
        "threads": torch.get_num_threads(),
    }
    set_parallel_sizes(tensor=2)
    collectives.make_axis_groups()
    results["of data and of tensor ranks"] = [
        collectives.sum_across_ranks(mine, axis=axis).tolist() for axis in ("data", "tensor")
    ]
    summand = mine.clone().requires_grad_()
    total = collectives.sum_with_gradient(summand, axis="tensor")
    (total**2).sum().backward()
    results["differentiable sum"] = [total.tolist(), summand.grad.tolist()]
    (folder / f"{rank}.json").write_text(json.dumps(results))


def standard_error_over_ranks(rank: int, device: torch.device) -> float:
    """Of the values 1 0 | 1 of groups 7 2 | 7 on rank 0, and 0 1 | filler of groups 5 2 | -1 on rank 1."""
    values = torch.tensor([[1.0, 0, 1], [0, 1, 1]], device=device)[rank]
    groups = torch.tensor([[7, 2, 7], [5, 2, -1]], device=device)[rank]
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]], device=device)[rank]
    mean = MeanOverRanks()
    for part in (slice(0, 2), slice(2, 3)):
        mean.add(values[part], groups=groups[part], mask=mask[part])
    return mean.standard_error()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    process_group.destroy_process_group()
