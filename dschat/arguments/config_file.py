"""--config FILE: flags of a program from a YAML or JSON file, as words of its command line."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dschat.arguments.record import STARTING
from dschat.arguments.secrets import HIDDEN
from dschat.errors import UserError


def values_in(path: Path, prefixes: Mapping[str, str]) -> dict[str, Any]:
    """The values in a file, by the name of the flag.

    The file holds a mapping of flags to values, or, as a run's own arguments.json, one of groups to such
    mappings; `prefixes` are those of the groups' flags, by group. A value that is null is left out, and of a
    run's arguments also what says how that run was started. Raises `UserError` for what is no such file.
    """
    found = {}
    for name, value in _read(path).items():
        if not isinstance(value, dict):
            found[name] = value
        elif name in prefixes:
            found |= {prefixes[name] + key: v for key, v in value.items() if key not in ("prefix", *STARTING)}
        else:
            groups = f" (there are {', '.join(prefixes)})" if prefixes else ""
            raise UserError(
                f"--config {path}: {name} holds a mapping, and no group of flags is called so{groups}."
            )
    return {name: value for name, value in found.items() if value not in (None, [])}


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.expanduser().read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=_Loader)
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read as YAML or JSON: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        kind = "list" if isinstance(values, list) else "single value"
        raise UserError(f"--config {path} must hold a mapping of flags to values, not a {kind}.")
    return {str(name): value for name, value in values.items()}


class _Loader(yaml.SafeLoader):
    """YAML in which no key comes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: {key.value} is given twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def words_of(path: Path, flag: str, value: Any, action: argparse.Action) -> list[str]:
    """A flag and its value, or its values, as the words of a command line that `action` reads.

    Raises `UserError` for a value that the flag cannot have, and for one whose password was not kept.
    """
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        if not isinstance(entry, str | int | float):
            raise UserError(f"--config {path}: {flag[2:]} must be a word, a number or a list of them.")
        if HIDDEN in str(entry):
            raise UserError(
                f"--config {path}: the password or token in {flag[2:]} was not kept; give {flag} on the "
                "command line."
            )
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"--config {path}: {flag[2:]} must be true or false, got {value!r}.")
        return [flag] if value else []
    if isinstance(value, bool):
        return [f"{flag}={str(value).lower()}"]
    if isinstance(value, list) and action.nargs in ("+", "*"):
        return [flag, *map(str, value)]
    if len(entries) > 1 and not isinstance(action, argparse._AppendAction):
        raise UserError(f"--config {path}: {flag[2:]} takes one value, got {value}.")
    return [f"{flag}={entry}" for entry in entries]


def without_config(words: Sequence[str]) -> tuple[list[str], Path | None]:
    """The words of a command line without --config FILE, and the file. Raises `UserError` for two files."""
    kept, files, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            kept += [word, *rest]
            break
        if word == "--config":
            if not rest or rest[0].startswith("--"):
                raise UserError("--config needs a YAML or JSON file.")
            files.append(rest.pop(0))
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        else:
            kept.append(word)
    if len(files) > 1:
        raise UserError(f"--config is given {len(files)} times; put the flags into one file.")
    return kept, Path(files[0]) if files else None
