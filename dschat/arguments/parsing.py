"""The command line to a step's object."""

import argparse
import dataclasses
import difflib
import functools
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

from dschat.arguments.command_line import LIKENESS, FlagHelp, ReadableParser, as_typed, to_bool
from dschat.arguments.foreign import explain_foreign_flag
from dschat.arguments.foreign_flags import FOREIGN
from dschat.arguments.steps import STEPS, InspectArguments, StepArguments
from dschat.errors import UserError

PROGRAMS = {
    "sft": "step1_sft/main.py",
    "reward": "step2_reward/main.py",
    "dpo": "step2_reward/dpo.py",
    "rlhf": "step3_ppo/main.py",
    "inspect": "scripts/inspect_data.py",
}

_SUPERVISED = (
    *("model_name_or_path", "data_path", "output_dir", "num_train_epochs", "per_device_train_batch_size"),
    *("max_seq_len", "learning_rate", "lora_dim", "dtype"),
)
TO_KNOW = {
    "sft": (*_SUPERVISED, "resume_from_checkpoint"),
    "reward": (*_SUPERVISED, "resume_from_checkpoint"),
    "dpo": (*_SUPERVISED, "beta"),
    "rlhf": (
        *("actor_model_name_or_path", "critic_model_name_or_path", "data_path", "output_dir"),
        *("max_prompt_seq_len", "max_answer_seq_len", "per_device_generation_batch_size"),
        *("actor_learning_rate", "kl_coef", "resume_from_checkpoint"),
    ),
    "inspect": (
        *("model_name_or_path", "data_path", "data_format", "prompt_key", "chosen_key", "rejected_key"),
        *("data_split", "chat_template", "max_seq_len", "html"),
    ),
}
"""The ten flags of each step with which its help begins."""

WARMUP = frozenset({"warmup_ratio", "num_warmup_steps"})
"""The two ways to say how long warm-up takes."""


class FlagParser(ReadableParser):
    """The parser of a step, which also knows the names of other programs and of the other steps."""

    exclusive = WARMUP

    def __init__(self, step: str) -> None:
        super().__init__(formatter_class=FlagHelp, description=sys.modules["__main__"].__doc__)
        self._step, self.to_know = step, TO_KNOW[step]
        self.prefixes = {part.name: part.metadata["prefix"] for part in fields(STEPS[step])}
        for part in fields(STEPS[step]):
            metadata = part.metadata
            add_flags(self, part.name, metadata["group"], metadata["prefix"], defaults=metadata["defaults"])

    def explain(self, name: str) -> str | None:
        """What to write in place of a flag that this step does not have."""
        known = flags_of(self._step)
        name = name.lower().replace("-", "_")
        everywhere = {flag for step in STEPS for flag in flags_of(step)}
        close = difflib.get_close_matches(name, sorted({*FOREIGN, *everywhere}), n=1, cutoff=LIKENESS)
        for spelt in [name, *close]:
            explanation = super().explain(spelt) if spelt in known else explain_foreign_flag(spelt, known)
            if explanation:
                return explanation
            for step, program in PROGRAMS.items():
                explanation = explain_foreign_flag(spelt, flags_of(step))
                if explanation:
                    start = as_typed(f"python {program}").removeprefix("python ")
                    return f"not of this program; in {start}: {explanation.removeprefix('here: ')}"
        return None


def add_flags(
    parser: argparse.ArgumentParser,
    name: str,
    group: type[Any],
    prefix: str = "",
    *,
    defaults: dict[str, Any],
) -> None:
    """Add the flags of a group to a parser, in a section of its help; `defaults` replace the group's own."""
    section = parser.add_argument_group(f"{name} ({' '.join((group.__doc__ or '').split())})")
    for f in _flags_in(group):
        _declare(section, prefix + f.name, f, defaults)


@functools.cache
def flags_of(step: str) -> frozenset[str]:
    """The names of a step's flags."""
    return frozenset(
        part.metadata["prefix"] + f.name
        for part in fields(STEPS[step])
        for f in _flags_in(part.metadata["group"])
    )


def _flags_in(group: type[Any]) -> list["dataclasses.Field[Any]"]:
    """The settings of a group that are flags."""
    return [f for f in fields(group) if "help" in f.metadata]


def _declare(
    section: "argparse._ArgumentGroup", name: str, f: "dataclasses.Field[Any]", defaults: dict[str, Any]
) -> None:
    """Add the flag of a setting to argparse; one that is on by default gets a second flag, --no_NAME.

    `defaults` are those of the step, by the setting's name, in place of the group's.
    """
    spelt = [f"--{name}", f"--{name.replace('_', '-')}"] if "_" in name else [f"--{name}"]
    options: dict[str, Any] = {"help": f.metadata["help"], **f.metadata["argparse"]}
    default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    default = defaults.get(f.name, default)
    options |= {"required": True} if default is dataclasses.MISSING else {"default": default}
    kind = get_args(f.type)[0] if type(None) in get_args(f.type) else f.type
    if kind is bool:
        section.add_argument(*spelt, type=to_bool, nargs="?", const=True, **options)
        if default is True:
            negated = [f"--no_{name}", f"--no-{name.replace('_', '-')}"]
            options |= {"default": False, "help": f"Turn --{name} off."}
            section.add_argument(*negated, action="store_false", dest=name, **options)
    elif get_origin(kind) is Literal:
        section.add_argument(*spelt, choices=get_args(kind), **options)
    elif get_origin(kind) is list:
        section.add_argument(*spelt, type=get_args(kind)[0], nargs="+", **options)
    else:
        section.add_argument(*spelt, **{"type": kind, **options})


UNLIMITED = ("max_kl", "max_length_ratio")
"""Limits that inf switches off."""


def _check_numbers(values: dict[str, Any]) -> None:
    """Raise `UserError` for nan, inf and numbers that no tensor holds."""
    for name, value in values.items():
        if name in UNLIMITED and value == float("inf"):
            continue
        if isinstance(value, int | float) and not abs(value) < 2**63:
            raise UserError(f"--{name} must be a finite number below 2**63, got {value}.")


def _check_warmup(argv: Sequence[str] | None) -> None:
    """Raise `UserError` where warm-up is given twice. Later a default looks like what was given."""
    given = {word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    if {f"--{name}" for name in WARMUP} <= given:
        raise UserError(
            "--warmup_ratio and --num_warmup_steps exclude each other: a share of the run, or a number of "
            "optimiser steps; leave one of them out."
        )


def parse_arguments(
    step: Literal["sft", "reward", "dpo", "rlhf", "inspect"], argv: Sequence[str] | None = None
) -> StepArguments | InspectArguments:
    """The arguments of a step from the command line (`sys.argv` by default).

    Raises `UserError` for an unknown flag, a value of the wrong type, and settings that cannot work together.
    """
    values = vars(FlagParser(step).parse_args(argv))
    _check_numbers(values)
    _check_warmup(argv)
    groups = {}
    for part in fields(STEPS[step]):
        group, prefix = part.metadata["group"], part.metadata["prefix"]
        settings = {f.name: values[prefix + f.name] for f in _flags_in(group)}
        groups[part.name] = group(**settings, **({"prefix": prefix} if prefix else {}))
    return STEPS[step](**groups)
