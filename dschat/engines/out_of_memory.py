"""Where memory runs out, the run ends with a message of phase, consumers and remedies, or starts again."""

import errno
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psutil
import torch
from torch import Tensor

from dschat.arguments import ModelArguments
from dschat.distributed import deepspeed_private, restart
from dschat.distributed.device import current_device, give_back_memory
from dschat.distributed.mesh import mesh
from dschat.distributed.process_wide import process_wide
from dschat.engines.memory_remedies import MemoryFlags, Phase, PhaseKind, halved, remedies
from dschat.errors import UserError
from dschat.runs.output_folder import newest_checkpoint

SIGNS = ("can't allocate memory", "out of memory", "not enough memory", "_STATUS_ALLOC_FAILED")
"""What the RuntimeErrors of allocators and libraries say of it."""

RARE = (PhaseKind.LOADING, PhaseKind.EVALUATING, PhaseKind.EXPORTING)
"""Phases around which what malloc keeps is given back; others come again with the same sizes."""

GIB = 2**30


class MemoryReport:
    """What a message about memory needs, in this process: its handlers stand around calls deep in the run."""

    def __init__(self) -> None:
        self.flags: MemoryFlags | None = None
        """Flags that decide how much memory the run takes; None, as in tests, leaves errors as they are."""
        self.engines: dict[str, weakref.ref[Any]] = {}
        """Engines that may still be alive, by their model's name."""


def report_memory_with(flags: MemoryFlags) -> None:
    """Let messages about memory in this process name these flags."""
    process_wide(MemoryReport).flags = flags


def report_models_with(models_of: Mapping[str, ModelArguments], offloads: Iterable[str]) -> None:
    """Let messages about memory in this process name the flags of single models, as in `MemoryFlags`."""
    kept = process_wide(MemoryReport)
    if kept.flags is not None:
        kept.flags = replace(kept.flags, models_of=models_of, offloads=tuple(offloads))


def consumes(model: str, engine: Any) -> None:
    """Name an engine by its model, for the list of consumers."""
    process_wide(MemoryReport).engines[model] = weakref.ref(engine)


@contextmanager
def phase(kind: PhaseKind, model: str = "") -> Iterator[None]:
    """Where memory runs out inside, end the run with a `UserError` that names this phase, or start it again.

    `model` is the name of the model that the phase is about, if it is about one. With --auto_micro_batch
    every rank starts again with half the micro-batch, where that is more than 1; this call does not return
    then.
    """
    try:
        if kind in RARE:
            give_back_memory()
        yield
        if kind in RARE:
            give_back_memory()
    except (RuntimeError, MemoryError, OSError) as error:
        flags = process_wide(MemoryReport).flags
        if flags is None or not is_out_of_memory(error):
            raise
        now = Phase(kind, model)
        message = report(now, flags, error)
        if flags.run.auto_micro_batch and halved(now, flags):
            _start_smaller(now, flags)
        raise UserError(*message) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that no memory was left, on the device or in the machine."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        sign in str(error) for sign in SIGNS
    )


def report(phase: Phase, flags: MemoryFlags, error: BaseException) -> list[str]:
    """The lines of the message: phase, consumers, the device's memory, and what helps."""
    reason = next(iter(str(error).splitlines()), "") or "MemoryError"  # which usually has no message
    world = mesh().world
    who = f"rank {world.rank} of {world.size}" if world.size > 1 else "the run"
    lines = [f"{who} ran out of memory while {phase} ({reason[:200]})."]
    lines += [f"  {text}" for text in _consumers()]
    lines += ["What helps, the first thing first:", *(f"  {text}" for text in remedies(phase, flags))]
    if halved(phase, flags) and not flags.run.auto_micro_batch:
        lines.append("  --auto_micro_batch does the first by itself")
    return lines


def _start_smaller(phase: Phase, flags: MemoryFlags) -> None:
    """Start the run again with half the micro-batch; returns only where that cannot be done."""
    more: dict[str, Any] = dict(halved(phase, flags))
    changes = " and ".join(f"--{flag} {value}" for flag, value in more.items())
    begin = "from the beginning, as there is no checkpoint (--save_interval makes some)"
    if newest_checkpoint(flags.run):
        begin = "from its newest checkpoint"
        more |= {"resume_from_checkpoint": "latest", "overwrite_output_dir": False}
    restart.order(
        more,
        f"note: rank {mesh().world.rank} ran out of memory while {phase}: --auto_micro_batch starts the run "
        f"again with {changes}, the same batch in smaller parts, {begin}.",
    )


def _consumers() -> list[str]:
    """GiB that this rank holds on its device, the largest first, and the device's total."""
    device = current_device()
    sizes: dict[str, float] = {}
    for model, reference in process_wide(MemoryReport).engines.items():
        engine = reference()
        if engine is not None:
            for kind, tensors in _tensors_of(engine).items():
                sizes[f"{kind} of the {model}"] = _held(tensors, device.type)
    if device.type == "cpu":
        memory = psutil.virtual_memory()
        used, free, total = psutil.Process().memory_info().rss, memory.available, memory.total
    else:
        used = torch.cuda.memory_allocated(device)
        free, total = torch.cuda.mem_get_info(device)
    sizes["activations, caches and all else"] = max(used - sum(sizes.values()), 0)
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    shown = [f"{size / GIB:8.3f} GiB  {what}" for what, size in ordered if size > 0]
    place = "machine" if device.type == "cpu" else "device"
    ranks = f" for {mesh().machine.size} ranks" if device.type == "cpu" and mesh().machine.size > 1 else ""
    return [*shown, f"{used / GIB:8.3f} GiB  in all; the {place} has {total / GIB:.1f} GiB{ranks}, "
            f"{free / GIB:.1f} GiB of them free"]  # fmt: skip


def _tensors_of(engine: Any) -> dict[str, list[Tensor]]:
    """What an engine holds, by kind; DeepSpeed keeps gradients and fp32 weights in several places."""
    parameters = list(engine.module.parameters())
    shards = [deepspeed_private.own_shard(p) for p in parameters]
    weights = [*parameters, *(shard for shard in shards if shard is not None)]
    found = {"weights": weights, "gradients": [p.grad for p in parameters if p.grad is not None]}
    inner = deepspeed_private.inner_optimizer(engine)
    if not hasattr(inner, "param_groups"):
        return found
    masters = [p for group in inner.param_groups for p in group["params"]]
    found["gradients"] += [p.grad for p in masters if p.grad is not None]
    found["gradients"] += _tensors_in(deepspeed_private.gradient_buffers(engine))
    own = {id(p) for p in parameters}
    found["optimiser states"] = [p for p in masters if id(p) not in own] + _tensors_in(dict(inner.state))
    return found


def _tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested lists and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    parts: Iterable = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for part in parts for tensor in _tensors_in(part)]


def _held(tensors: Iterable[Tensor], device: str) -> int:
    """Bytes on that kind of device, memory that several share counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in tensors if t.device.type == device}  # fmt: skip
    return sum(storages.values())
