"""How a flag is declared and checked."""

import dataclasses
from dataclasses import field, fields
from typing import Any, Literal

from dschat.errors import UserError


def flag(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    at_resume: Literal["same", "free", "divided"] = "same",
    **metadata: Any,
) -> Any:
    """A setting that is a command-line flag; without a default it is required.

    at_resume: whether a run that goes on from a checkpoint must have the same value (it decides what is
    learned), is free to have another (it does not, or what it names is compared by its content), or may
    divide the same batches in another way. `metadata` are further settings of argparse.
    """
    metadata = {"help": help, "at_resume": at_resume, "argparse": metadata}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def group(group_class: type, prefix: str = "", **defaults: Any) -> Any:
    """A group inside a step's object: its flags carry `prefix`, and `defaults` replace the group's own."""
    known = {f.name for f in fields(group_class)}
    assert set(defaults) <= known, f"{group_class.__name__} has no {set(defaults) - known}"
    return field(metadata={"group": group_class, "prefix": prefix, "defaults": defaults})


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_at_least(minimum: float, settings: Any, *names: str, prefix: str = "") -> None:
    """Each named setting must be at least `minimum`."""
    for name in names:
        value = getattr(settings, name)
        require(value >= minimum, f"--{prefix}{name} must be at least {minimum}, got {value}.")
