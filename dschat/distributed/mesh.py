"""Which process this is among how many, along each axis of parallelism."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from dschat.distributed.process_wide import process_wide
from dschat.errors import UserError

AxisName = Literal["world", "data", "tensor", "sequence", "pipeline"]


@dataclass(frozen=True)
class Axis:
    """A process's place along one axis."""

    rank: int = 0
    """0 up to, but without, `size`."""
    size: int = 1


class ParallelSizes:
    """Ranks that share a model's layers, tokens and weights: what the flags of this process's run ask for."""

    pipeline = 1
    tensor = 1
    sequence = 1


@dataclass(frozen=True)
class Mesh:
    """The processes of a run as a grid, and this process's place in it.

    Processes are numbered by pipeline, data, tensor and sequence rank, the last fastest, as DeepSpeed numbers
    them. Example: 8 processes with 2 tensor-parallel ranks are 4 ranks of data times 2 of tensor; process 5
    has data rank 2 and tensor rank 1. Processes see different rows where their data ranks differ.
    """

    world: Axis
    """All processes, numbered from 0: files of a process's own and messages have this number."""
    data: Axis
    """Ranks that share the rows of a batch."""
    machine: Axis
    """Processes on this machine."""
    tensor: Axis = Axis()
    """Ranks that share the weights of a layer."""
    sequence: Axis = Axis()
    """Ranks that share the tokens of a row."""
    pipeline: Axis = Axis()
    """Ranks that share the layers of a model."""

    @property
    def zero_size(self) -> int:
        """Ranks over which DeepSpeed averages gradients and ZeRO shards: those of data and of sequence."""
        return self.data.size * self.sequence.size

    @property
    def is_main_process(self) -> bool:
        """Whether this process prints, logs and writes."""
        return self.world.rank == 0


def mesh() -> Mesh:
    """The mesh by the environment's variables and `set_parallel_sizes`; one process where there are none."""
    world = Axis(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    local_rank, local_size = (os.environ.get(name) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    machine = Axis(
        world.rank if local_rank is None else int(local_rank),
        world.size if local_size is None else int(local_size),
    )
    sizes = process_wide(ParallelSizes)
    rest, sequence = divmod(world.rank, sizes.sequence)
    rest, tensor = divmod(rest, sizes.tensor)
    data_size = world.size // (sizes.pipeline * sizes.tensor * sizes.sequence)
    pipeline, data = divmod(rest, data_size)
    return Mesh(
        world=world,
        data=Axis(data, data_size),
        machine=machine,
        tensor=Axis(tensor, sizes.tensor),
        sequence=Axis(sequence, sizes.sequence),
        pipeline=Axis(pipeline, sizes.pipeline),
    )


def stage() -> Axis | None:
    """This process's place in the pipeline, None where a model is whole."""
    return mesh().pipeline if mesh().pipeline.size > 1 else None


def set_parallel_sizes(*, tensor: int = 1, sequence: int = 1, pipeline: int = 1) -> None:
    """Divide the processes among the axes; what the three do not take is the size of data.

    Raises `UserError` as `check_parallel_sizes` does.
    """
    sizes = {"pipeline": pipeline, "tensor": tensor, "sequence": sequence}
    check_parallel_sizes(sizes, mesh().world.size)
    for name, size in sizes.items():
        setattr(process_wide(ParallelSizes), name, size)


def check_parallel_sizes(sizes: Mapping[str, int], world: int) -> None:
    """Raise `UserError` where the number of processes is no multiple of the product of the sizes."""
    if world % (product := prod(sizes.values())):
        given = " times ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        raise UserError(
            f"the parallel sizes, {given}, need a multiple of {product} ranks, and this run has {world}: "
            "start as many with torchrun --nproc_per_node or deepspeed --num_gpus."
        )


def data_ranks_of(world_size: int) -> list[int]:
    """The ranks that differ from this one in data alone, in a run of so many with the same parallel sizes.

    Where fewer ranks than share a row now are those of that run, it had other sequence ranks: any of them.
    """
    here = mesh()
    shared = here.tensor.size * here.sequence.size
    data_size = max(1, world_size // (here.pipeline.size * shared))
    first = (
        here.pipeline.rank * data_size * shared + here.tensor.rank * here.sequence.size + here.sequence.rank
    )
    return [(first + data * shared) % world_size for data in range(data_size)]


def is_main_process() -> bool:
    """Whether this process prints, logs and writes."""
    return mesh().is_main_process
