"""What helps where memory runs out: the flags that decide how much a run takes, with smaller values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from dschat.arguments import ModelArguments, RlhfArguments, RunArguments, StepArguments
from dschat.distributed.device import current_device
from dschat.distributed.mesh import mesh, stage


class PhaseKind(Enum):
    """What a run does in a phase; the value is what messages say."""

    LOADING = "loading"
    TRAINING = "training"
    EVALUATING = "evaluating"
    SAMPLING = "sampling answers"
    ANALYZING = "judging answers"
    EXPORTING = "exporting"


@dataclass(frozen=True)
class Phase:
    """A phase of a run: `Phase(PhaseKind.TRAINING, "critic")`."""

    kind: PhaseKind
    model: str = ""
    """Name of the model that the phase is about, without an article; empty where it is about several."""

    def __str__(self) -> str:
        return f"{self.kind.value} the {self.model}" if self.model else self.kind.value

    @property
    def is_training(self) -> bool:
        """Whether gradients and optimiser states take memory in it."""
        return self.kind is PhaseKind.TRAINING

    @property
    def reads_rows(self) -> bool:
        """Whether rows of a batch, and so their number and length, take memory in it."""
        return self.kind not in (PhaseKind.LOADING, PhaseKind.EXPORTING)

    @property
    def builds_optimizer(self) -> bool:
        """Whether optimiser states are made or used in it."""
        return self.kind in (PhaseKind.LOADING, PhaseKind.TRAINING)


@dataclass(frozen=True)
class BatchFlags:
    """The flags that divide a batch: rows of a micro-batch, and how many micro-batches there are."""

    rows_flag: str
    rows: int
    parts_flag: str | None = None
    """None where the number of micro-batches follows from the data."""
    parts: int = 1


@dataclass(frozen=True)
class Change:
    """Flags with other values, which take less memory."""

    flags: Mapping[str, Any]
    text: str
    """The flags with their present and their new values, for messages."""


@dataclass(frozen=True, kw_only=True)
class MemoryFlags:
    """The flags of a run that decide how much memory it takes."""

    run: RunArguments
    models: tuple[ModelArguments, ...]
    """Flags of the trained models."""
    models_of: Mapping[str, ModelArguments] = field(default_factory=dict)
    """Flags that decide the memory of a model, by its name in phases; a missing name means all models."""
    batches: Mapping[PhaseKind, BatchFlags]
    """How the batch of a phase is divided; phases without are missing."""
    token_budget: int = 0
    """Value of --max_tokens_per_batch where it divides the batch of training."""
    length: tuple[str, int, int]
    """Flag, value and least useful value of the length of rows, in tokens."""
    gather: str | None = None
    """Value of --rollout_gather where rollouts may gather a sharded actor."""
    holds_first_pass: bool = False
    """Whether --reuse_first_pass both holds activations of actor and critic at one time."""
    row_shares: int | None = None
    """Value of --sequence_parallel_size in steps that have it."""
    offloads: tuple[str, ...] = field(default=())
    """Flags not given that would move the weights of frozen models to the CPU between uses."""


def memory_flags(args: StepArguments) -> MemoryFlags:
    """The flags of a step that decide how much memory it takes, but for those of step 3's single models."""
    accumulation = ("gradient_accumulation_steps", args.optimizer.gradient_accumulation_steps)
    if not isinstance(args, RlhfArguments):
        batch = args.batch
        batches = {
            PhaseKind.EVALUATING: BatchFlags("per_device_eval_batch_size", batch.per_device_eval_batch_size)
        }
        if not batch.max_tokens_per_batch:
            batches[PhaseKind.TRAINING] = BatchFlags(
                "per_device_train_batch_size", batch.per_device_train_batch_size, *accumulation
            )
        return MemoryFlags(
            run=args.run,
            models=(args.model,),
            batches=batches,
            token_budget=batch.max_tokens_per_batch,
            length=("max_seq_len", batch.max_seq_len, 4),
            row_shares=args.parallel.sequence_parallel_size,
        )
    minibatch = BatchFlags(
        "per_device_training_batch_size", args.ppo.per_device_training_batch_size, *accumulation
    )
    rollout = BatchFlags(
        *("per_device_generation_batch_size", args.rollout.per_device_generation_batch_size),
        *("generation_batches", args.rollout.generation_batches),
    )
    may_gather = args.actor.zero_stage == 3 and args.rollout.rollout_gather != "never"
    return MemoryFlags(
        run=args.run,
        models=(args.actor, args.critic),
        batches={PhaseKind.SAMPLING: rollout, PhaseKind.ANALYZING: minibatch, PhaseKind.TRAINING: minibatch},
        length=("max_answer_seq_len", args.rollout.max_answer_seq_len, 1),
        gather=args.rollout.rollout_gather if may_gather else None,
        holds_first_pass=args.rlhf.reuse_first_pass == "both" and args.ppo.has_critic,
    )


def halved(phase: Phase, flags: MemoryFlags) -> dict[str, int]:
    """Values for half the micro-batch and the same global batch; empty where a micro-batch is one row."""
    batch = flags.batches.get(phase.kind)
    if batch is None or batch.rows == 1:
        return {}
    if batch.parts_flag is None:
        return {batch.rows_flag: batch.rows // 2}
    rows, parts = smaller_parts(batch.rows, batch.parts)
    return {batch.rows_flag: rows, batch.parts_flag: parts}


def smaller_parts(rows: int, parts: int) -> tuple[int, int]:
    """About half the rows in about twice the parts, whose product stays: 16 x 1 -> 8 x 2, 3 x 2 -> 2 x 3."""
    total = rows * parts
    smaller = next(size for size in range((rows + 1) // 2, 0, -1) if total % size == 0)
    return smaller, total // smaller


def remedies(phase: Phase, flags: MemoryFlags) -> list[str]:
    """Flags that help in this phase, with their present values, the cheapest first."""
    found = changes(phase, flags, ranks=mesh().world.size, on_cpu=current_device().type == "cpu")
    return [change.text for change in found] or ["a smaller model, or a device with more memory"]


def changes(phase: Phase, flags: MemoryFlags, *, ranks: int, on_cpu: bool) -> list[Change]:
    """The changes of flags that help in this phase on so many ranks, the cheapest first."""
    models = [flags.models_of[phase.model]] if phase.model in flags.models_of else flags.models
    found = _smaller_batch(phase, flags)
    for model in models:
        found += _of_model(phase, model, offload=flags.run.offload, ranks=ranks, on_cpu=on_cpu)
    if phase.kind in (PhaseKind.ANALYZING, PhaseKind.TRAINING) and flags.holds_first_pass:
        found.append(
            Change({"reuse_first_pass": "actor"}, "--reuse_first_pass both -> actor (the same numbers)")
        )
    if phase.kind is PhaseKind.SAMPLING and flags.gather:
        found.append(Change({"rollout_gather": "never"}, f"--rollout_gather {flags.gather} -> never"))
    if not on_cpu:
        found += [Change({flag.removeprefix("--"): True}, flag) for flag in flags.offloads]
    if phase.reads_rows:
        name, length, least = flags.length
        shorter = max(length // 2, least)
        found.append(Change({name: shorter}, f"--{name} {length} -> {shorter}"))
    if phase.is_training and flags.row_shares and not halved(phase, flags):
        more = 2 * flags.row_shares
        shares = f"--sequence_parallel_size {flags.row_shares} -> {more}"
        text = f"{shares} on twice as many devices (each row's tokens are shared)"
        found.append(Change({"sequence_parallel_size": more}, text))
    if flags.run.dtype == "fp32":
        found.append(Change({"dtype": "bf16"}, "--dtype fp32 -> bf16"))
    return found


def _smaller_batch(phase: Phase, flags: MemoryFlags) -> list[Change]:
    if phase.is_training and flags.token_budget:
        budget = flags.token_budget // 2
        text = f"--max_tokens_per_batch {flags.token_budget} -> {budget} (the same gradient)"
        return [Change({"max_tokens_per_batch": budget}, text)]
    batch, values = flags.batches.get(phase.kind), halved(phase, flags)
    if batch is None or not values:
        return []
    present = {batch.rows_flag: batch.rows, batch.parts_flag: batch.parts}
    text = " with ".join(f"--{flag} {present[flag]} -> {value}" for flag, value in values.items())
    return [Change(values, text + (" (the same gradient)" if phase.is_training else ""))]


def _of_model(
    phase: Phase, model: ModelArguments, *, offload: bool, ranks: int, on_cpu: bool
) -> list[Change]:
    """Flags of one trained model."""
    p, found = model.prefix, []
    if phase.is_training and not model.gradient_checkpointing:
        found.append(Change({f"{p}gradient_checkpointing": True}, f"--{p}gradient_checkpointing"))
    in_pipeline = stage() is not None
    higher = 1 if in_pipeline else 2 if model.zero_stage < 2 else 3
    if ranks > 1 and model.zero_stage < higher and not model.load_in_4bit:
        found.append(Change({f"{p}zero_stage": higher}, f"--{p}zero_stage {model.zero_stage} -> {higher}"))
    if phase.builds_optimizer and not on_cpu and not offload and not in_pipeline:
        sharded = {f"{p}zero_stage": 2} if model.zero_stage == 0 else {}
        text = "--offload" + (f" with --{p}zero_stage 2" if sharded else "")
        found.append(Change({"offload": True, **sharded}, text))
    if phase.builds_optimizer and not model.uses_lora:
        flags = {f"{p}lora_dim": 64, "only_optimize_lora": True}
        found.append(Change(flags, f"--{p}lora_dim 64 --only_optimize_lora"))
    return found
