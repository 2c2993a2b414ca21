"""What a run was asked to do, flag by flag: for its folder, its model cards, and resumed runs."""

import dataclasses
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dschat.arguments.data import DataArguments
from dschat.arguments.run import RunArguments
from dschat.arguments.secrets import recorded

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

STARTING = ("local_rank", "resume_from_checkpoint", "overwrite_output_dir")
"""Flags that say how a run is started, not what it does."""


@dataclass(frozen=True)
class Setting:
    """A flag of a run."""

    value: Any
    """As files have it: passwords and tokens in URLs are hidden."""
    default: Any
    """`dataclasses.MISSING` for a required flag."""
    at_resume: Literal["same", "free", "divided"]
    """Whether a resumed run must have the same value; see `arguments.flags.flag`."""


@dataclass(frozen=True, kw_only=True)
class RunDescription:
    """What one run was asked to do, independent of which step it is; a step's object makes it once."""

    step: str
    """The name of the step: sft, reward, dpo or rlhf."""
    run: RunArguments
    data: DataArguments
    settings: dict[str, Setting]
    """Every flag of the step, by name."""
    batch_sizes: dict[str, int]
    """Rows that one rank contributes to a batch, by the product of flags that sets them."""
    groups: dict[str, dict[str, Any]]
    """The content of arguments.json: the values of each group by field, passwords and tokens hidden."""

    def changed_flags(self) -> dict[str, Any]:
        """The values that are not the defaults, by flag; required flags are among them."""
        return {
            name: setting.value
            for name, setting in self.settings.items()
            if setting.value != setting.default and name not in STARTING
        }

    def global_sizes(self, num_ranks: int) -> dict[str, int]:
        """Rows in a batch of all ranks, which stay the same however ranks and micro-batches divide them."""
        return {flags: rows * num_ranks for flags, rows in self.batch_sizes.items()}

    def divided(self, sizes: dict[str, int], num_ranks: int) -> dict[str, int] | None:
        """Flags with which so many ranks have batches of these `global_sizes`; None where they cannot.

        Micro-batches keep their rows where that divides a rank's part, and have fewer where not.
        """
        flags: dict[str, int] = {}
        for product, total in sizes.items():
            rows_flag, parts_flag = product.replace("--", "").split(" x ")
            own, rest = divmod(total, num_ranks)
            if rest or not own:
                return None
            rows = next(n for n in range(self.settings[rows_flag].value, 0, -1) if own % n == 0)
            flags |= {rows_flag: rows, parts_flag: own // rows}
        return flags

    def write(self, path: Path) -> None:
        """Replace the file `path` by the groups as JSON, in one step."""
        temporary = path.with_name(f".{path.name}.writing")
        temporary.write_text(json.dumps(self.groups, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)


def settings_of(arguments: "DataclassInstance") -> dict[str, Setting]:
    """Every flag of a step's object, by name with the prefix of its group."""
    found = {}
    for part in fields(arguments):
        for f in fields(part.metadata["group"]):
            if "help" not in f.metadata:
                continue
            value = recorded(getattr(getattr(arguments, part.name), f.name))
            setting = Setting(value, default_of(part, f), f.metadata["at_resume"])
            found[part.metadata["prefix"] + f.name] = setting
    return found


def groups_of(arguments: "DataclassInstance") -> dict[str, dict[str, Any]]:
    """The values of a step's object as files have them: by group, then by field."""
    groups = dataclasses.asdict(arguments)
    return {name: {f: recorded(value) for f, value in group.items()} for name, group in groups.items()}


def saved_settings(step: "type[DataclassInstance]", saved: dict[str, Any]) -> dict[str, Any]:
    """The values of a step's flags in the content of an arguments.json, by name with prefix.

    A flag that is not in the file was unknown when it was written and gets its default.
    """
    found = {}
    for part in fields(step):
        values = saved.get(part.name, {})
        for f in fields(part.metadata["group"]):
            if "help" in f.metadata:
                found[part.metadata["prefix"] + f.name] = values.get(f.name, default_of(part, f))
    return found


def default_of(part: "dataclasses.Field[Any]", f: "dataclasses.Field[Any]") -> Any:
    """The default of a group's flag in a step; MISSING where it is required."""
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return part.metadata["defaults"].get(f.name, f.default)
