"""The command line to a step's object."""

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass
from typing import Any, Literal

from transformers import HfArgumentParser

from dschat.arguments.steps import STEPS, InspectArguments, StepArguments
from dschat.errors import ReadableParser, UserError


class FlagParser(ReadableParser, HfArgumentParser):
    """argparse, with one readable line for an error instead of a screen of usage."""

    def reject_unknown(self, remaining: Sequence[str]) -> None:
        """Raise `UserError` for flags that no group declares, with the name that was probably meant."""
        if remaining:
            name = remaining[0].split("=")[0]
            if not name.startswith("-"):
                self.error(f"{remaining[0]!r} belongs to no flag")
            close = difflib.get_close_matches(name, self._option_string_actions, n=1)
            self.error(f"unknown flag {name}" + (f" (did you mean {close[0]}?)" if close else ""))


def _flat_class(part: dataclasses.Field) -> type:
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
    flat = make_dataclass(f"{part.name}_flags", columns, kw_only=True)
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


def parse_arguments(
    step: Literal["sft", "reward", "dpo", "rlhf", "inspect"], argv: Sequence[str] | None = None
) -> StepArguments | InspectArguments:
    """The arguments of a step from the command line (`sys.argv` by default).

    Raises `UserError` for an unknown flag, a value of the wrong type, and settings that cannot work together.
    """
    parts = fields(STEPS[step])
    parser = FlagParser([_flat_class(part) for part in parts], allow_abbrev=False)
    *flats, remaining = parser.parse_args_into_dataclasses(
        argv, look_for_args_file=False, return_remaining_strings=True
    )
    parser.reject_unknown(remaining)
    _check_numbers(flats)
    groups = {}
    for part, flat in zip(parts, flats, strict=True):
        prefix = part.metadata["prefix"]
        values = {f.name.removeprefix(prefix): getattr(flat, f.name) for f in fields(flat)}
        if prefix:
            values["prefix"] = prefix
        groups[part.name] = part.metadata["group"](**values)
    return STEPS[step](**groups)
