"""A step whose memory "runs out" on one rank wherever a micro-batch of training has more than so many rows.

[torchrun --nproc_per_node N] out_of_memory.py STEP LIMIT RANK FLAGS...
"""

import sys
from typing import Any

import torch
from three_steps import program

from dschat.arguments import parse_arguments
from dschat.distributed import process_group
from dschat.distributed.mesh import mesh
from dschat.program import prepare, readable_errors


def run_out(step: str, limit: int, rank: int) -> Any:
    """The step's program, with a loss that fails as an allocation does."""
    module = program(step)
    if step == "rlhf":
        from dschat.rlhf import updates as place

        name = "actor_loss"
    else:
        place, name = module, {"sft": "answer_loss", "reward": "loss_and_metrics"}[step]
    right = getattr(place, name)

    def fails(*args: Any, **settings: Any) -> Any:
        batch = next(arg for arg in args if hasattr(arg, "rollout" if step == "rlhf" else "tokens"))
        rows = len((batch.rollout if step == "rlhf" else batch.tokens).input_ids)
        if torch.is_grad_enabled() and rows > limit and mesh().world.rank == rank:
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB.")
        return right(*args, **settings)

    setattr(place, name, fails)
    return module


if __name__ == "__main__":
    place = [flag for flag in sys.argv[1:] if flag.startswith("--local_rank")]  # deepspeed's, before all else
    step, limit, rank, *flags = [flag for flag in sys.argv[1:] if flag not in place]
    args = parse_arguments(step, [*place, *flags])
    with readable_errors(args.run.debug):
        run_out(step, int(limit), int(rank)).main(args, prepare(args))
        process_group.destroy_process_group()
