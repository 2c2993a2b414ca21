"""What a run was started with, flag by flag: for its folder, its card, and a run that goes on from it."""

import dataclasses
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from dschat.arguments.secrets import recorded
from dschat.arguments.steps import RlhfArguments, StepArguments


def write_arguments(arguments: StepArguments, path: Path) -> None:
    """Keep what a run was started with, but for passwords and tokens in URLs, as JSON, one object a group.

    The file is replaced in one step.
    """
    groups = dataclasses.asdict(arguments)
    kept = {name: {f: recorded(value) for f, value in group.items()} for name, group in groups.items()}
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


@dataclass(frozen=True)
class Setting:
    """A flag of a run."""

    value: Any
    default: Any
    at_resume: Literal["same", "free", "divided"]


def settings(arguments: StepArguments) -> dict[str, Setting]:
    """Every flag of a step, by name, as files have it; the default of a required one is MISSING."""
    found = {}
    for part in fields(arguments):
        for f in fields(part.metadata["group"]):
            if "help" not in f.metadata:
                continue
            value = recorded(getattr(getattr(arguments, part.name), f.name))
            setting = Setting(value, _default(part, f), f.metadata["at_resume"])
            found[part.metadata["prefix"] + f.name] = setting
    return found


def saved_settings(step: type[StepArguments], saved: dict[str, Any]) -> dict[str, Any]:
    """The values of a step's flags in what `write_arguments` wrote; one that is not there had its default."""
    found = {}
    for part in fields(step):
        values = saved.get(part.name, {})
        for f in fields(part.metadata["group"]):
            if "help" in f.metadata:
                found[part.metadata["prefix"] + f.name] = values.get(f.name, _default(part, f))
    return found


def _default(part: dataclasses.Field, f: dataclasses.Field) -> Any:
    """The default of a group's flag in a step; MISSING where it is required."""
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return part.metadata["defaults"].get(f.name, f.default)


STARTING = ("local_rank", "resume_from_checkpoint", "overwrite_output_dir")
"""Flags that say how a run is started, not what it does."""


def changed_flags(arguments: StepArguments) -> dict[str, Any]:
    """The flags whose values are not their defaults, by name; those without a default are among them."""
    return {
        name: setting.value
        for name, setting in settings(arguments).items()
        if setting.value != setting.default and name not in STARTING
    }


def global_sizes(arguments: StepArguments, world_size: int) -> dict[str, int]:
    """What stays the same however ranks and micro-batches divide it, by the flags whose product it is."""
    if isinstance(arguments, RlhfArguments):
        return {
            "--per_device_generation_batch_size x --generation_batches": arguments.rollout_size * world_size,
            "--per_device_training_batch_size x --gradient_accumulation_steps": arguments.minibatch_size
            * world_size,
        }
    rows = arguments.batch.per_device_train_batch_size * arguments.optimizer.gradient_accumulation_steps
    return {"--per_device_train_batch_size x --gradient_accumulation_steps": rows * world_size}
