"""How a program reads its command line: argparse, with messages a person can act on."""

import argparse
import difflib
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, cast

from dschat.arguments.config_file import values_in, without_config, words_of
from dschat.console import messages
from dschat.errors import UserError

LIKENESS = 0.75
"""Of two names (difflib's ratio, 1 for equal ones), at least, for one to be suggested for the other."""

FLAG = re.compile(r"([-–—−]+)([^\W\d][\w.-]*)(=.*)?", re.DOTALL)  # noqa: RUF001
"""A word that is meant as a flag. A document's editor may have made another dash of its hyphens."""


class FlagHelp(argparse.RawDescriptionHelpFormatter):
    """Help that shows a flag in one spelling, the kind of its value, and its default where it has one."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        spelt = {name.lstrip("-").replace("-", "_"): name for name in reversed(action.option_strings)}
        kind = {int: "N", float: "X"}.get(cast(type, action.type), action.dest.rpartition("_")[2].upper())
        values = "" if action.nargs == 0 or action.type is to_bool else f" {self._format_args(action, kind)}"
        return f"{', '.join(reversed(spelt.values()))}{values}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default in (None, False, [], "", argparse.SUPPRESS):
            return action.help
        shown = " ".join(default) if isinstance(default, list) else "on" if default is True else default
        return f"{action.help} (default: {shown})"


class ReadableParser(argparse.ArgumentParser):
    """argparse whose errors are one message: a `UserError` instead of a screen of usage.

    Flags that are not there are named together, with what was probably meant, before anything else that is
    wrong with the command line; names are not abbreviated. --config FILE stands for the flags in the file.
    Where the package argcomplete is installed, it completes the words of a shell.
    """

    command: ClassVar[str] = ""
    """The words that started the program where the command dschat did, such as "dschat sft"."""
    commands: ClassVar[Mapping[str, str]] = {}
    """What follows `dschat` for each program's file, where the command dschat started this one."""
    to_know: Sequence[str] = ()
    """The names of the flags with which the help begins."""
    prefixes: Mapping[str, str] = {}
    """What the flags of a group begin with, by the group's name in a run's arguments.json."""
    exclusive: frozenset[str] = frozenset()
    """Flags of which one at most is given: one on the command line replaces the others in a file."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        prog = self.command or (sys.argv[0] if sys.argv[0].endswith(".py") else None)
        kwargs["description"] = as_typed(kwargs.get("description") or "")
        super().__init__(*args, **{"prog": prog, "allow_abbrev": False, **kwargs})
        self.add_argument(
            "--config",
            metavar="FILE",
            default=argparse.SUPPRESS,
            help="YAML or JSON file of flags and values, such as the arguments.json of a run; a flag on the "
            "command line wins over the file.",
        )

    def format_help(self) -> str:
        """The usage, the description, the flags to know and all others by group."""
        first = [self._option_string_actions[f"--{name}"] for name in self.to_know]
        if not first:
            return super().format_help()
        formatter = self._get_formatter()
        required = [formatter._format_action_invocation(a) for a in self._actions if a.required]
        formatter.add_usage(f"{' '.join(['%(prog)s', *required])} [--FLAG VALUE ...]", [], [])
        formatter.add_text(self.description)
        formatter.start_section("flags to know (all others follow, by group)")
        formatter.add_arguments(first)
        formatter.end_section()
        for group in self._action_groups:
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments([action for action in group._group_actions if action not in first])
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, or in a shell that completes a command line the words that may come next."""
        complete(self)
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        before, required, flags = message.partition("the following arguments are required: ")
        if required:  # argparse names each in all its spellings
            message = f"{before}required and not given: {re.sub('/--[^,]*', '', flags)}"
        raise UserError(f"{message.rstrip('.')}. --help lists every flag.")

    def parse_known_args(  # type: ignore[override]  # argparse's overloads are for other namespaces
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's; but a flag that is not there is an error, and so are words that belong to none.

        --flag=-- is one too, which in argparse gives the flag an empty list. A negative number in scientific
        notation is a value.
        """
        words, file = without_config(sys.argv[1:] if args is None else args)
        for word in words:
            if word.startswith("--") and word.endswith("=--"):
                self.error(f"argument {word[:-3]}: expected a value, got '--'")
        if not {"-h", "--help"} & set(words):
            self._reject_unknown(words)
        of_file = self._words_in(file, words) if file else []
        try:
            found, remaining = super().parse_known_args([*of_file, *_joined_numbers(words)], namespace)
        except UserError as error:
            named = [word.partition("=")[0] for word in of_file]
            if any(re.search(rf"{flag}\b", str(error)) for flag in named if flag.startswith("--")):
                raise UserError(f"--config {file}: {error}") from error
            raise
        if remaining:
            self.error(f"{remaining[0]!r} belongs to no flag{self._hint(remaining[0])}")
        self._note_repeated(words)
        return found, []

    def _words_in(self, file: Path, words: Sequence[str]) -> list[str]:
        """The flags of a file as words, without those that the command line's words give or exclude."""
        given = {self._option_string_actions.get(word.partition("=")[0]) for word in words}
        excluded = {self._option_string_actions.get(f"--{name}") for name in self.exclusive}
        replaced = given | excluded if given & excluded - {None} else given
        found = []
        for key, value in values_in(file, self.prefixes).items():
            spelt = (f"--{key}", f"--{key.replace('-', '_')}", f"--{key.replace('_', '-')}")
            flag = next((name for name in spelt if name in self._option_string_actions), None)
            if flag in (None, "--config", "--help"):
                meant = self.explain(key)
                hint = f" ({meant})" if meant else ""
                raise UserError(f"--config {file}: unknown flag {key}{hint}. --help lists every flag.")
            action = self._option_string_actions[flag]
            if action not in replaced:
                found += words_of(file, flag, value, action)
        return found

    def own_words(self, words: Sequence[str]) -> tuple[list[str], list[str]]:
        """The words that are this parser's, and the others, for a program that passes them to another parser.

        Its own are --help, its flags with their values, and the first word where it takes one by place;
        --config is among the others.
        """
        own: list[str] = []
        others: list[str] = []
        for before, word in zip(["", *words], words, strict=False):
            action = self._option_string_actions.get(word.partition("=")[0])
            is_own = action is not None and action.dest != "config"
            is_value = bool(own) and own[-1] is before and "=" not in before and self._takes_value(before)
            is_first = not own and not others and not word.startswith("-")
            (own if is_own or is_value or is_first else others).append(word)
        return own, others

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
                takes_list = self._option_string_actions[flag].nargs in ("+", "*")
                several = f"; several values go after one {flag}" if takes_list else ""
                messages.note(f"{flag} is given {times} times, and only the last counts{several}.")


def as_typed(text: str) -> str:
    """A text with commands, those of files in the words of `dschat` where that started this program."""
    for file, name in ReadableParser.commands.items():
        text = text.replace(f"python {file}", f"dschat {name}").replace(file, f"--module dschat {name}")
    return text


def to_bool(word: str) -> bool:
    """A word of the command line as True or False; any other is argparse's `ArgumentTypeError`."""
    if word.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if word.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(
        f"{word!r} must be yes or no, true or false, t or f, y or n, 1 or 0, in any case"
    )


def complete(parser: argparse.ArgumentParser) -> None:
    """Where a shell asks argcomplete to complete a command line, answer with one spelling and end."""
    if "_ARGCOMPLETE" in os.environ:
        from argcomplete import autocomplete

        others = [name for action in parser._actions for name in action.option_strings[1:]]
        autocomplete(parser, exclude=[name for name in others if "-" in name.lstrip("-")])


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
