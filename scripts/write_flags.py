"""Write docs/flags.md: every flag of the steps, from the declarations in dschat/arguments/.

python scripts/write_flags.py            writes docs/flags.md; a test says when it is stale
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.arguments import PROGRAMS, STEPS, default_of

PAGE = ROOT / "docs" / "flags.md"
COMMANDS = {"sft": "sft", "reward": "reward", "dpo": "dpo", "rlhf": "ppo", "inspect": "inspect"}
START = """\
# Flags

Every flag of the steps by the group that declares it, written by `scripts/write_flags.py`. `-` and `_` in a
name are the same. A flag that is on by default is turned off by `--no_NAME`. `--config FILE` reads flags from
YAML or JSON. "At resume" says whether a run that goes on from a checkpoint must have the same value, is free
to have another, or may divide the same batches in another way.
"""


def page() -> str:
    """The whole page."""
    programs = [f"`{PROGRAMS[step]}` (`dschat {command}`)" for step, command in COMMANDS.items()]
    return "\n".join([START, f"Programs: {', '.join(programs)}.", *(section(group) for group in groups())])


def groups() -> list[type]:
    """The groups of all steps, in the order in which the steps have them."""
    return list(dict.fromkeys(part.metadata["group"] for step in STEPS.values() for part in fields(step)))


def section(group: type) -> str:
    """A group's heading, the steps that have it, and a table of its flags."""
    uses = [
        (step, part)
        for step, arguments in STEPS.items()
        for part in fields(arguments)
        if part.metadata["group"] is group
    ]
    names = dict.fromkeys(COMMANDS[step] for step, _ in uses)
    prefixes = [part.metadata["prefix"] for _, part in uses if part.metadata["prefix"]]
    lines = ["", f"## {' '.join((group.__doc__ or '').split())}", "", f"In `{'`, `'.join(names)}`."]
    if prefixes:
        lines[-1] += f" In `ppo` each has a prefix: `--{'NAME`, `--'.join(dict.fromkeys(prefixes))}NAME`."
    lines += ["", "| flag | default | at resume | |", "|---|---|---|---|"]
    for f in fields(group):
        if "help" in f.metadata:
            help_text = " ".join(f.metadata["help"].split()).replace("|", "\\|").replace("%%", "%")
            lines.append(f"| {spelt(f)} | {defaults(f, uses)} | {f.metadata['at_resume']} | {help_text} |")
    return "\n".join(lines)


def spelt(f: dataclasses.Field[Any]) -> str:
    """The flag and what it takes."""
    kind = next((k for k in get_args(f.type) if k is not type(None)), f.type)
    if get_origin(f.type) is Literal:
        kind = f.type
    if kind is bool:
        return f"`--{f.name}`"
    if get_origin(kind) is Literal:
        return f"`--{f.name} {'|'.join(get_args(kind))}`".replace("|", "\\|")
    if get_origin(f.type) is list:
        return f"`--{f.name} A B ...`"
    letter = {int: "N", float: "X"}.get(kind, "TEXT")
    return f"`--{f.name} {letter}`"


def defaults(f: dataclasses.Field[Any], uses: list[tuple[str, dataclasses.Field[Any]]]) -> str:
    """The default, or those of the steps where they differ."""
    found: dict[str, list[str]] = {}
    for step, part in uses:
        prefix = part.metadata["prefix"].rstrip("_")
        found.setdefault(shown(default_of(part, f)), []).append(prefix or COMMANDS[step])
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{value} ({', '.join(dict.fromkeys(names))})" for value, names in found.items())


def shown(value: Any) -> str:
    """A default as one writes it on the command line."""
    if value is dataclasses.MISSING:
        return "required"
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return f"`{' '.join(map(str, value))}`"
    return f"`{value}`".replace("|", "\\|") if value != "" else "none"


if __name__ == "__main__":
    PAGE.write_text(page() + "\n", encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
