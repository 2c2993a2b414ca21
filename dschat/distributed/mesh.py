"""Which process this is among how many, along each axis of parallelism."""

import os
from dataclasses import dataclass
from typing import Literal

AxisName = Literal["world", "data", "tensor", "sequence", "pipeline"]


@dataclass(frozen=True)
class Axis:
    """A process's place along one axis."""

    rank: int = 0
    """0 up to, but without, `size`."""
    size: int = 1


@dataclass(frozen=True)
class Mesh:
    """The processes of a run as a grid, and this process's place in it.

    Example: 8 processes with 2 tensor-parallel ranks are 4 ranks of data times 2 of tensor; process 5 has
    data rank 2 and tensor rank 1. Processes see different rows where their data ranks differ.
    """

    world: Axis
    """All processes, numbered from 0: files of a process's own and messages have this number."""
    data: Axis
    """Ranks that share the rows of a batch, and over which gradients are averaged and ZeRO shards."""
    machine: Axis
    """Processes on this machine."""
    tensor: Axis = Axis()
    """Ranks that share the weights of a layer. One today."""
    sequence: Axis = Axis()
    """Ranks that share the tokens of a row. One today."""
    pipeline: Axis = Axis()
    """Ranks that share the layers of a model. One today."""

    @property
    def is_main_process(self) -> bool:
        """Whether this process prints, logs and writes."""
        return self.world.rank == 0


def mesh() -> Mesh:
    """The mesh by the environment's variables; one process where there are none."""
    world = Axis(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    local_rank, local_size = (os.environ.get(name) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    machine = Axis(
        world.rank if local_rank is None else int(local_rank),
        world.size if local_size is None else int(local_size),
    )
    return Mesh(world=world, data=world, machine=machine)


def is_main_process() -> bool:
    """Whether this process prints, logs and writes."""
    return mesh().is_main_process
