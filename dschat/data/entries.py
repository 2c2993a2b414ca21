"""Values of --data_path: the name of a data set, options for a part of it, and a weight.

An entry is NAME, NAME:0.3, NAME:split=train_sft or NAME:config=main,split=train_sft,revision=refs/pr/1:0.3,
which shells pass on without quotes. A file or folder that has exactly that name is meant first.
"""

import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dschat.data.files import readable, user_path
from dschat.errors import UserError

OPTIONS = ("config", "split", "revision")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
OPTION_LIST = re.compile(r"(.+?):(\w+=[^,:]*(?:,\w+=[^,:]*)*)")
PLAIN = re.compile(r"[\w@%+=:,./~-]+")
"""What shells take as it stands."""
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Entry:
    """One value of a flag that names data."""

    name: str
    """A path, a pattern of paths, or a hub id."""
    flag: str = "--data_path"
    evaluates: bool = False
    """Whether it is for evaluation only."""
    config: str | None = None
    split: str | None = None
    """One split, or several joined by +."""
    revision: str | None = None
    weight: float | None = None

    @property
    def label(self) -> str:
        """The entry without its weight."""
        given = {option: getattr(self, option) for option in OPTIONS}
        options = ",".join(f"{option}={value}" for option, value in given.items() if value is not None)
        return f"{self.name}:{options}" if options else self.name

    def __str__(self) -> str:
        weight = "" if self.weight is None else f":{self.weight:g}"
        text = self.label + weight
        return f"{self.flag} {text if PLAIN.fullmatch(text) else shlex.quote(text)}"

    def choices(self, option: str, values: list[str]) -> str:
        """What to write for each value of an option, or for the first of many, as a phrase."""
        shown = values if len(values) <= 6 else values[:3]
        changes: list[dict[str, Any]] = [{option: value} for value in shown]
        texts = [str(replace(self, **change)) for change in changes]
        return " or ".join(texts) + (", or likewise" if shown is not values else "")


def parse_entry(text: str, flag: str = "--data_path", *, evaluates: bool = False) -> Entry:
    """Parse a value of `flag`. Raises `UserError` for unknown options and for weights that are no numbers."""
    if not text:
        raise UserError(f"{flag} has an empty value; give the name of a data set.")
    name = text
    weight: float | None = None
    options: dict[str, Any] = {}
    with readable(Path(text)):  # a name may be too long for a path
        while not user_path(name).exists():
            before = name
            if weight is None:
                name, weight = _weighted(name, text, flag)
            if name == before and not options:
                name, options = _with_options(name, text, flag)
            if name == before:
                _check_colon(name, text, flag)
                break
    return Entry(name, flag, evaluates, weight=weight, **options)


def _weighted(entry: str, text: str, flag: str) -> tuple[str, float | None]:
    """The entry without a weight at its end, and the weight."""
    name, colon, number = entry.rpartition(":")
    if not colon or not NUMBER.fullmatch(number):
        return entry, None
    if not 0 < float(number) < float("inf"):
        raise UserError(f"{flag} {text}: the weight must be positive, got {number}; 0.3 is one.")
    return name, float(number)


def _with_options(name: str, text: str, flag: str) -> tuple[str, dict[str, str]]:
    """The name without the options at its end, and these."""
    found = OPTION_LIST.fullmatch(name)
    if found is None:
        return name, {}
    pairs = [option.split("=", 1) for option in found[2].split(",")]
    for option, value in pairs:
        if option not in OPTIONS:
            raise UserError(f"{flag} {text}: {option} is no option of a data set; {', '.join(OPTIONS)} are.")
        if not value:
            raise UserError(f"{flag} {text}: {option} has no value; leave it out, or say which is meant.")
    options = dict(pairs)
    if len(options) < len(pairs):
        raise UserError(f"{flag} {text}: an option is given twice; split=a+b joins splits.")
    return found[1], options


def _check_colon(name: str, text: str, flag: str) -> None:
    """Raise `UserError` where what follows a colon is neither a weight nor an option."""
    before, colon, behind = name.rpartition(":")
    if behind.startswith("//"):
        raise UserError(f"{flag} {text}: addresses are not read; download the file and give its path.")
    if not colon or not (user_path(before).exists() or HUB_ID.fullmatch(before)):
        return
    raise UserError(
        f"{flag} {text}: the weight must be a number, got {behind!r}; 0.3 is one. A split or a configuration "
        f"is named as in {before}:split=train_sft and {before}:config=main."
    )
