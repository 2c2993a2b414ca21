"""How a program reads its command line: argparse, with messages a person can act on."""

import argparse
import difflib
import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, NoReturn

from dschat.console import messages
from dschat.errors import UserError

LIKENESS = 0.75
"""Of two names (difflib's ratio, 1 for equal ones), at least, for one to be suggested for the other."""

FLAG = re.compile(r"([-–—−]+)([^\W\d][\w.-]*)(=.*)?", re.DOTALL)  # noqa: RUF001
"""A word that is meant as a flag. A document's editor may have made another dash of its hyphens."""


class ReadableParser(argparse.ArgumentParser):
    """argparse whose errors are one message: a `UserError` instead of a screen of usage.

    Flags that are not there are named together, with what was probably meant, before anything else that is
    wrong with the command line; names are not abbreviated.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.rstrip('.')}. --help lists every flag.")

    def parse_known_args(  # type: ignore[override]  # argparse's overloads are for other namespaces
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's; but a flag that is not there is an error, and so are words that belong to none.

        --flag=-- is one too, which in argparse gives the flag an empty list. A negative number in scientific
        notation is a value.
        """
        words = list(sys.argv[1:] if args is None else args)
        for word in words:
            if word.startswith("--") and word.endswith("=--"):
                self.error(f"argument {word[:-3]}: expected a value, got '--'")
        if not {"-h", "--help"} & set(words):
            self._reject_unknown(words)
        found, remaining = super().parse_known_args(_joined_numbers(words), namespace)
        if remaining:
            self.error(f"{remaining[0]!r} belongs to no flag{self._hint(remaining[0])}")
        self._note_repeated(words)
        return found, []

    def explain(self, name: str) -> str | None:
        """What to write in place of a flag (its name without hyphens before it) that is not there."""
        for spelt in (name, name.lower(), name.lower().replace("-", "_"), name.lower().replace("_", "-")):
            if f"--{spelt}" in self._option_string_actions:
                return f"did you mean --{spelt}?"
        known = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
        close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=LIKENESS)
        return f"did you mean --{close[0]}?" if close else None

    def _reject_unknown(self, words: Sequence[str]) -> None:
        explanations = {}
        for before, word in zip(["", *words], words, strict=False):
            if word == "--":
                break
            match = FLAG.fullmatch(word)
            name = word.partition("=")[0]
            if not match or name in self._option_string_actions or _is_number(word):
                continue
            explanation = self.explain(match[2])
            if explanation is None and self._takes_value(before):
                explanation = f"as a value of {before} it is written {before}={word}"
            explanations[name] = f"{name} ({explanation})" if explanation else name
        lines = list(explanations.values())
        if len(lines) == 1:
            self.error(f"unknown flag {lines[0]}")
        if lines:
            raise UserError("unknown flags (--help lists every flag):", *(f"  {line}" for line in lines))

    def _hint(self, word: str) -> str:
        if word.startswith("-") and " " in word:
            return "; a flag and its value are two words, without quotes around both"
        setting = re.fullmatch(r"\+*(?:\w+\.)*(\w+)=.*", word, re.DOTALL)  # as Hydra's programs take them
        explanation = self.explain(setting[1]) if setting else None
        return f" ({explanation})" if explanation else ""

    def _takes_value(self, word: str) -> bool:
        action = self._option_string_actions.get(word)
        return action is not None and action.nargs in (None, "+")

    def _note_repeated(self, words: Sequence[str]) -> None:
        """Say that of a flag that is given twice only the last counts; one that collects has them all."""
        given: Counter[str] = Counter()
        for word in words:
            action = self._option_string_actions.get(word.partition("=")[0])
            if action is not None and not isinstance(action, argparse._AppendAction):
                given[action.option_strings[0]] += 1
        for flag, times in given.items():
            if times > 1:
                several = f"; several values go after one {flag}" if self._takes_list(flag) else ""
                messages.note(f"{flag} is given {times} times, and only the last counts{several}.")

    def _takes_list(self, flag: str) -> bool:
        return self._option_string_actions[flag].nargs in ("+", "*")


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _joined_numbers(words: Sequence[str]) -> list[str]:
    """--flag -1e-5 as --flag=-1e-5: argparse takes such a number for a flag."""
    joined: list[str] = []
    for word in words:
        is_negative = word.startswith("-") and _is_number(word)
        if joined and is_negative and FLAG.fullmatch(joined[-1]) and "=" not in joined[-1]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined
