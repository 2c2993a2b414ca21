"""What to say, or to do, where memory runs out: the phase, the largest consumers, and the flags that help."""

import errno
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor

from dschat.arguments import ModelArguments, RlhfArguments, StepArguments
from dschat.distributed import deepspeed_private, restart
from dschat.distributed.device import current_device
from dschat.distributed.mesh import mesh
from dschat.errors import UserError
from dschat.runs.output_folder import newest_checkpoint

SIGNS = ("can't allocate memory", "out of memory", "not enough memory", "_STATUS_ALLOC_FAILED")
"""What the RuntimeErrors of allocators and libraries say of it."""

GIB = 2**30
TRAINING_ROWS = "per_device_training_batch_size"

_arguments: list[StepArguments] = []
_engines: dict[str, weakref.ref] = {}


def remember(arguments: StepArguments) -> None:
    """The flags that messages name."""
    _arguments[:] = [arguments]


def consumes(role: str, engine: Any) -> None:
    """Name an engine, for the list of consumers."""
    _engines[role] = weakref.ref(engine)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Where memory runs out inside, end the run with a `UserError` that names this phase, or start it again.

    `name` is "loading ...", "training ..." or "evaluating" with the model's role behind it, or "sampling
    answers", "judging answers", "exporting". With --auto_micro_batch every rank starts again with half the
    micro-batch, where that is more than 1; this call does not return then.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not _arguments or not is_out_of_memory(error):
            raise
        message = report(name, _arguments[0], error)
        flags = halved(name, _arguments[0])
        if _arguments[0].run.auto_micro_batch and flags:
            _start_smaller(name, _arguments[0], flags)
        raise UserError(*message) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that no memory was left, on the device or in the machine."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        sign in str(error) for sign in SIGNS
    )


def report(name: str, args: StepArguments, error: BaseException) -> list[str]:
    """The lines of the message: phase, consumers, the device's memory, and what helps."""
    lines = [f"{_where()} out of memory while {name} ({str(error).splitlines()[0][:200] or 'MemoryError'})."]
    lines += [f"  {text}" for text in _consumers()]
    lines += ["What helps, the first thing first:", *(f"  {text}" for text in _remedies(name, args))]
    if halved(name, args) and not args.run.auto_micro_batch:
        lines.append("  --auto_micro_batch does the first by itself")
    return lines


def _where() -> str:
    return f"rank {mesh().world.rank} of {mesh().world.size} ran" if mesh().world.size > 1 else "the run ran"


def halved(name: str, args: StepArguments) -> dict[str, int]:
    """Flags for half the micro-batch and the same global batch; empty where a micro-batch is one row."""
    is_rlhf = isinstance(args, RlhfArguments)
    if name.startswith("evaluating"):
        size = 1 if is_rlhf else args.batch.per_device_eval_batch_size
        return {"per_device_eval_batch_size": size // 2} if size > 1 else {}
    if name == "sampling answers":
        names = ("per_device_generation_batch_size", "generation_batches")
        sizes = (args.rollout.per_device_generation_batch_size, args.rollout.generation_batches)
    elif name.startswith("training") or name == "judging answers":
        group, rows = (args.ppo, TRAINING_ROWS) if is_rlhf else (args.batch, "per_device_train_batch_size")
        names = (rows, "gradient_accumulation_steps")
        sizes = (getattr(group, rows), args.optimizer.gradient_accumulation_steps)
    else:
        return {}
    return dict(zip(names, smaller_parts(*sizes), strict=True)) if sizes[0] > 1 else {}


def smaller_parts(rows: int, parts: int) -> tuple[int, int]:
    """About half the rows in about twice the parts, whose product stays: 16 x 1 -> 8 x 2, 3 x 2 -> 2 x 3."""
    total = rows * parts
    smaller = next(size for size in range((rows + 1) // 2, 0, -1) if total % size == 0)
    return smaller, total // smaller


def _start_smaller(name: str, args: StepArguments, flags: dict[str, int]) -> None:
    changes = " and ".join(f"--{flag} {value}" for flag, value in flags.items())
    more: dict[str, Any] = dict(flags)
    begin = "from the beginning, as there is no checkpoint (--save_interval makes some)"
    if newest_checkpoint(args.run):
        begin = "from its newest checkpoint"
        more |= {"resume_from_checkpoint": "latest", "overwrite_output_dir": False}
    restart.order(
        more,
        f"note: rank {mesh().world.rank} ran out of memory while {name}: --auto_micro_batch starts the run "
        f"again with {changes}, the same batch in smaller parts, {begin}.",
    )


def _consumers() -> list[str]:
    """GiB that this rank holds on its device, the largest first, and the device's total."""
    device = current_device()
    sizes: dict[str, float] = {}
    for role, reference in _engines.items():
        engine = reference()
        if engine is not None:
            for kind, tensors in _tensors_of(engine).items():
                sizes[f"{kind} of the {role}"] = _held(tensors, device.type)
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


def _remedies(name: str, args: StepArguments) -> list[str]:
    """Flags that help in this phase, with their present values, the cheapest first."""
    present = {
        field: getattr(group, field)
        for group in vars(args).values()
        for field in getattr(group, "__dataclass_fields__", {})
    }
    flags = halved(name, args)
    told = [" with ".join(f"--{flag} {present[flag]} -> {value}" for flag, value in flags.items())]
    told[0] += " (the same gradient)" if name.startswith("training") and flags else ""
    told += [text for model in _models(name, args) for text in _model_remedies(name, model, args)]
    if isinstance(args, RlhfArguments):
        told += _rlhf_remedies(name, args)
    elif not name.startswith(("loading", "exporting")):
        told.append(f"--max_seq_len {args.batch.max_seq_len} -> {max(args.batch.max_seq_len // 2, 4)}")
    if args.run.dtype == "fp32":
        told.append("--dtype fp32 -> bf16")
    return [text for text in told if text] or ["a smaller model, or a device with more memory"]


def _models(name: str, args: StepArguments) -> list[ModelArguments]:
    """The trained models that the phase is about."""
    if not isinstance(args, RlhfArguments):
        return [args.model]
    if name.endswith(("the critic", "the reward model")):
        return [args.critic]
    return [args.actor] if name.endswith(("the actor", "the reference model")) else [args.actor, args.critic]


def _model_remedies(name: str, model: ModelArguments, args: StepArguments) -> list[str]:
    p, told = model.prefix, []
    if name.startswith("training") and not model.gradient_checkpointing:
        told.append(f"--{p}gradient_checkpointing")
    if mesh().world.size > 1 and model.zero_stage < 3 and not model.load_in_4bit:
        told.append(f"--{p}zero_stage {model.zero_stage} -> {2 if model.zero_stage < 2 else 3}")
    if name.startswith(("training", "loading")) and current_device().type != "cpu" and not args.run.offload:
        told.append("--offload" + (f" with --{p}zero_stage 2" if model.zero_stage == 0 else ""))
    if name.startswith(("training", "loading")) and not model.uses_lora:
        told.append(f"--{p}lora_dim 64 --only_optimize_lora")
    return told


def _rlhf_remedies(name: str, args: RlhfArguments) -> list[str]:
    told = []
    if name == "sampling answers" and args.actor.zero_stage == 3 and args.rollout.rollout_gather != "never":
        told.append(f"--rollout_gather {args.rollout.rollout_gather} -> never")
    if current_device().type != "cpu":
        offloads = {"reference": args.actor.zero_stage, "reward": args.critic.zero_stage}
        for which, stage in offloads.items():
            if stage == 3 and not getattr(args.rlhf, f"offload_{which}_model"):
                told.append(f"--offload_{which}_model")
    if not name.startswith(("loading", "exporting")):
        length = args.rollout.max_answer_seq_len
        told.append(f"--max_answer_seq_len {length} -> {max(length // 2, 1)}")
    return told
