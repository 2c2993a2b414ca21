"""The command line to a step's object."""

import dataclasses
import difflib
import functools
import sys
from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass
from typing import Any, Literal

from transformers import HfArgumentParser

from dschat.arguments.command_line import LIKENESS, ReadableParser
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


class FlagParser(ReadableParser, HfArgumentParser):
    """The parser of a step, which also knows the names of other programs and of the other steps."""

    def __init__(self, step: str) -> None:
        super().__init__([_flat_class(part) for part in fields(STEPS[step])])
        self._step = step

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
                    return f"not of this step; in {program}: {explanation.removeprefix('here: ')}"
        return None


@functools.cache
def flags_of(step: str) -> frozenset[str]:
    """The names of a step's flags."""
    return frozenset(
        part.metadata["prefix"] + f.name
        for part in fields(STEPS[step])
        for f in fields(part.metadata["group"])
        if "help" in f.metadata
    )


def _flat_class(part: dataclasses.Field) -> type[Any]:
    """The flags of one group as a flat class that HfArgumentParser understands."""
    prefix, defaults = part.metadata["prefix"], part.metadata["defaults"]
    columns = []
    for f in fields(part.metadata["group"]):
        if "help" not in f.metadata:
            continue
        default, factory = defaults.get(f.name, f.default), f.default_factory
        metadata = {"help": f.metadata["help"], **f.metadata["argparse"]}
        spec = field(default=default, metadata=metadata)
        if factory is not dataclasses.MISSING:
            spec = field(default_factory=factory, metadata=metadata)
        columns.append((prefix + f.name, f.type, spec))
    flat: Any = make_dataclass(f"{part.name}_flags", columns, kw_only=True)
    flat._argument_group_name = f"{part.name} ({' '.join(part.metadata['group'].__doc__.split())})"
    return flat


UNLIMITED = ("max_kl", "max_length_ratio")
"""Limits that inf switches off."""


def _check_numbers(flats: Sequence[Any]) -> None:
    """Raise `UserError` for nan, inf and numbers that no tensor holds."""
    for name, value in (item for flat in flats for item in vars(flat).items()):
        if name in UNLIMITED and value == float("inf"):
            continue
        if isinstance(value, int | float) and not abs(value) < 2**63:
            raise UserError(f"--{name} must be a finite number below 2**63, got {value}.")


def _check_warmup(argv: Sequence[str] | None) -> None:
    """Raise `UserError` where warm-up is given twice. Later a default looks like what was given."""
    given = {word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    if {"--warmup_ratio", "--num_warmup_steps"} <= given:
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
    parts = fields(STEPS[step])
    flats = FlagParser(step).parse_args_into_dataclasses(argv, look_for_args_file=False)
    _check_numbers(flats)
    _check_warmup(argv)
    groups = {}
    for part, flat in zip(parts, flats, strict=True):
        prefix = part.metadata["prefix"]
        values = {f.name.removeprefix(prefix): getattr(flat, f.name) for f in fields(flat)}
        if prefix:
            values["prefix"] = prefix
        groups[part.name] = part.metadata["group"](**values)
    return STEPS[step](**groups)
