"""Which flags would cut the memory of a run most, and the cheapest flags with which it fits."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from dschat.arguments import TrainingStep
from dschat.engines.memory_remedies import Phase, PhaseKind, changes, memory_flags
from dschat.errors import UserError
from dschat.planning.plan import GB, Plan
from dschat.runs.measured_choices import MeasuredChoices

KINDS = {
    "load": PhaseKind.LOADING,
    "generate": PhaseKind.SAMPLING,
    "experience": PhaseKind.ANALYZING,
    "train": PhaseKind.TRAINING,
    "evaluate": PhaseKind.EVALUATING,
    "save": PhaseKind.EXPORTING,
}
"""The phases of a plan as messages about memory have them."""
NUM_SHOWN = 3
LEAST = 0.01
"""A change that saves a smaller share of the peak is not shown."""

PlanOf = Callable[[TrainingStep], Plan]


def changed(args: TrainingStep, flags: Mapping[str, Any]) -> TrainingStep | None:
    """The arguments with these flags; None where they do not go together."""
    try:
        with redirect_stdout(StringIO()):  # notes about flags were printed once
            return args.with_flags(flags)
    except UserError:
        return None


def would_cut_most(args: Any, plan: Plan, plan_of: PlanOf, choices: MeasuredChoices) -> list[str]:
    """One line of the changes of a step's arguments that lower the peak most; none where there are none.

    They are those that a message would name where memory ran out in the plan's worst phase. A plan is made
    for each, so the machine remembers what was found. Every rank must call it.
    """
    ranks, on_cpu = plan.hardware.ranks, plan.hardware.is_cpu
    tried = list(changes(Phase(KINDS[plan.worst]), memory_flags(args), ranks=ranks, on_cpu=on_cpu))
    others = ((change.text, changed(args, change.flags)) for change in tried)
    saved = choices.kept_numbers(
        "bytes that changes save",
        lambda: {text: plan.peak - plan_of(other).peak for text, other in others if other is not None},
        key={"phases": plan.as_json()["phases"], "changes": [change.text for change in tried]},
    )
    most = sorted((saved or {}).items(), key=lambda item: -item[1])[:NUM_SHOWN]
    texts = [f"{text} (-{less / GB:.2f} GB)" for text, less in most if less > LEAST * plan.peak]
    return [f"plan: would cut most: {'; '.join(texts)}"] if texts else []


def cheaper_first(
    args: TrainingStep, prefixes: Sequence[str], *, with_lora: bool
) -> Iterator[dict[str, Any]]:
    """Settings of the flags that decide memory, those that cost least time first.

    A larger ZeRO stage costs communication, gradient checkpointing a third of the computation, a smaller
    micro-batch the speed of the products, offloading the most.
    """
    sizes, (rows, parts) = args.pass_sizes, args.micro_batch
    total = rows * parts
    divisors = [size for size in range(rows, 0, -1) if total % size == 0]
    adapters = [{}, {f"{p}lora_dim": 64 for p in prefixes} | {"only_optimize_lora": True}]
    for lora in adapters if with_lora else adapters[:1]:
        for offload in (False, True):
            found = []
            for stage in (1, 2, 3) if offload else (0, 1, 2, 3):
                for recomputes in (False, True):
                    for size in divisors:
                        cost = (4 / 3 if recomputes else 1) * (1 + 0.05 * stage) * (1 + 0.1 / size)
                        flags: dict[str, Any] = dict(lora)
                        flags |= {f"{p}zero_stage": stage for p in prefixes}
                        flags |= {f"{p}gradient_checkpointing": recomputes for p in prefixes}
                        flags |= {sizes.train_rows_flag: size, "gradient_accumulation_steps": total // size}
                        found.append((cost, {**flags, "offload": offload}))
            yield from (flags for _, flags in sorted(found, key=lambda pair: pair[0]))


def fitting(
    args: TrainingStep, prefixes: Sequence[str], plan_of: PlanOf, *, with_lora: bool
) -> tuple[dict[str, Any], Plan] | None:
    """The first of `cheaper_first` whose plan fits, with its plan; None where none does."""
    for flags in cheaper_first(args, prefixes, with_lora=with_lora):
        other = changed(args, flags)
        if other is not None and (plan := plan_of(other)).fits:
            return flags, plan
    return None
