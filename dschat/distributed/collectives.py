"""What the ranks of an axis tell each other. Under plain `python` a run is a group of one."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dschat.distributed.device import current_device, device_type
from dschat.distributed.mesh import AxisName, mesh
from dschat.distributed.process_wide import process_wide


def barrier(*, axis: AxisName) -> None:
    """Wait for every rank of the axis."""
    if size_of(axis) > 1:
        dist.barrier(group=group_of(axis))


def sum_across_ranks(tensor: Tensor, *, axis: AxisName) -> Tensor:
    """The sum over the ranks of an axis of tensors of one shape, in fp64 so that counts stay whole."""
    total = tensor.detach().double()
    if size_of(axis) > 1:
        dist.all_reduce(total, group=group_of(axis))
    return total


def norm_across_tensor_ranks(whole: Sequence[Tensor], shards: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all tensors together: `whole` are equal on every tensor rank, `shards` its own parts."""
    norm = nn.utils.get_total_norm(whole)
    if not shards:
        return norm
    squares = sum_across_ranks(nn.utils.get_total_norm(shards).to(current_device()) ** 2, axis="tensor")
    return (norm**2 + squares.to(norm.device)).sqrt().float()


def sum_with_gradient(tensor: Tensor, *, axis: AxisName) -> Tensor:
    """The sum over the ranks of an axis of tensors of one shape, for a loss that all of them compute alike.

    Each gets the gradient of its own summand, so that the gradients of weights are to be added over the axis.
    """
    total: Tensor = _Sum.apply(tensor, group_of(axis)) if size_of(axis) > 1 else tensor
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def max_across_ranks(tensor: Tensor, *, axis: AxisName) -> Tensor:
    """The elementwise largest over the ranks of an axis of tensors of one shape."""
    largest = tensor.detach().clone()
    if size_of(axis) > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group_of(axis))
    return largest


def largest_across_ranks(number: int, device: torch.device, *, axis: AxisName) -> int:
    """The largest of one number per rank of the axis."""
    return int(max_across_ranks(torch.tensor(number, device=device), axis=axis))


def gather_rows(rows: Tensor, *, axis: AxisName) -> Tensor:
    """The rows of all ranks of an axis, in rank order. [B, ...] on each -> [ranks * B, ...]."""
    size = size_of(axis)
    if size == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(size)]
    dist.all_gather(parts, rows.contiguous(), group=group_of(axis))
    return torch.cat(parts)


def broadcast(tensor: Tensor, *, source: int, axis: AxisName) -> Tensor:
    """The tensor of the process `source`, numbered as in the world, on every rank of an axis."""
    if size_of(axis) > 1:
        dist.broadcast(tensor, source, group=group_of(axis))
    return tensor


def all_gather_object(value: Any, *, axis: AxisName) -> list[Any]:
    """The value of every rank of an axis, which JSON can hold, in rank order."""
    text = json.dumps(value).encode()
    if size_of(axis) == 1:
        return [json.loads(text)]
    length = largest_across_ranks(len(text), current_device(), axis=axis)
    row = torch.frombuffer(bytearray(text.ljust(length)), dtype=torch.uint8).to(current_device())
    return [json.loads(bytes(other.tolist())) for other in gather_rows(row[None], axis=axis)]


def in_first_stage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of all stages of a pipeline, on the CPU of those ranks of its first that have some.

    Later stages get nothing. They are sent one by one, so that no device holds more than one of them.
    """
    own = [[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()]
    rank, group, device = mesh().pipeline.rank, group_of("pipeline"), current_device()
    for number, described in enumerate(all_gather_object(own, axis="pipeline")[1:], start=1):
        for name, shape, dtype in described:
            if rank == number:
                dist.send(tensors[name].to(device), group=group, group_dst=0)
            elif rank == 0:
                received = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
                dist.recv(received, group=group, group_src=number)
                tensors[name] = received.cpu()
    return tensors if rank == 0 else {}


def broadcast_from_rank_0(make: Callable[[], Any]) -> Any:
    """What `make` returns on rank 0, where alone it is called: a value that JSON can hold. On every rank."""
    return all_gather_object(make() if mesh().is_main_process else None, axis="world")[0]


def first_error_across_ranks(work: Callable[[], str | None], *, axis: AxisName) -> str | None:
    """Do this rank's work on files, which returns or raises what goes wrong; the first error on every rank.

    Every rank must call it. So none waits for one that could not write.
    """
    try:
        problem = work()
    except (OSError, SafetensorError) as error:
        problem = str(error)
    problems = all_gather_object(problem, axis=axis)
    return next((f"rank {number}: {text}" for number, text in enumerate(problems) if text), None)


def size_of(axis: AxisName) -> int:
    """Ranks of the axis."""
    return int(getattr(mesh(), axis).size)


class AxisGroups:
    """The process groups of the axes, where a run has more than that of all its ranks."""

    grid: DeviceMesh | None = None


def make_axis_groups() -> None:
    """Make a process group for each axis that does not span all ranks. Every rank calls it once."""
    axes: tuple[AxisName, ...] = ("pipeline", "data", "tensor", "sequence")  # as a Mesh numbers them
    sizes = tuple(size_of(axis) for axis in axes)
    if size_of("data") != size_of("world"):
        process_wide(AxisGroups).grid = init_device_mesh(device_type(), sizes, mesh_dim_names=axes)


def group_of(axis: AxisName) -> dist.ProcessGroup | None:
    """The process group of this rank's neighbours along an axis; None, as torch has it, for all ranks."""
    grid = process_wide(AxisGroups).grid
    return None if axis == "world" or grid is None else grid.get_group(axis)
