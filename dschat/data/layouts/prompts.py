"""Prompts of a row: text or messages, with a system message and earlier turns from columns of their own."""

import ast
import json
import re
import warnings
from contextlib import suppress
from itertools import pairwise
from typing import Any

from dschat.data.cells import (
    BadRow,
    DroppedRow,
    Row,
    describe,
    first_filled,
    is_blank,
    optional,
    sound_text,
    text,
)
from dschat.data.comparisons import MARK, Prompt, Turn, parse_dialogue
from dschat.data.messages import asked, turns

WINDOWS_MARK = re.compile(r"\r\n\r\n(Human|Assistant):")
SYSTEMS = ("system", "system_prompt")
"""Columns that hold a system message."""


def text_prompt(value: str) -> str:
    """A prompt that is text. Raises `DroppedRow` where it ends with no question that an answer fits."""
    value = unix_marks(value)
    marks = list(MARK.finditer(value))
    if marks and marks[-1][1] == "Assistant" and value[marks[-1].end() :].strip():
        raise DroppedRow("prompts that end inside an answer")
    dialogue = parse_dialogue(value)
    if not dialogue or dialogue[-1].role != "user":
        raise DroppedRow("prompts with an empty question")
    return value


def unix_marks(value: str) -> str:
    """The text with Unix line endings, if it is a dialogue whose marks stand after Windows' own."""
    return value.replace("\r\n", "\n") if WINDOWS_MARK.search(value) else value


def a_prompt(row: Row, column: str = "prompt") -> Prompt:
    """The prompt in that column: text, or messages of which the last is a question."""
    value = messages_from_text(row.get(column))
    if isinstance(value, list):
        prompt = turns(value, f'"{column}"')
        if prompt[-1].role == "assistant":
            raise DroppedRow("prompts that end with an answer")
        return asked(prompt, f'"{column}"')
    return text_prompt(text(row, column))


def with_columns(row: Row, prompt: Prompt) -> Prompt:
    """The prompt after what columns of the row hold: a system message, unless the prompt has its own, and
    earlier questions with their answers. Text without such columns stays text."""
    dialogue = parse_dialogue(prompt) if isinstance(prompt, str) else prompt
    has_own = any(turn.role == "system" for turn in dialogue[:1])
    system = () if has_own else _system(row)
    earlier = _history(row)
    if not system and not earlier:
        return prompt
    whole = [*dialogue[:has_own], *system, *earlier, *dialogue[has_own:]]
    for before, turn in pairwise(whole):
        if before.role == turn.role:
            raise BadRow(f'with "history" two messages of the {turn.role} follow one another')
    return tuple(whole)


def _system(row: Row) -> tuple[Turn, ...]:
    column = first_filled(row, *SYSTEMS)
    return () if column is None else (Turn("system", text(row, column).strip()),)


def _history(row: Row) -> tuple[Turn, ...]:
    """Earlier turns: a list of [question, answer] or of messages, also as the JSON text of one."""
    value = from_text(optional(row, "history"))
    if is_blank(value):
        return ()
    if not isinstance(value, list):
        raise BadRow(f'"history" must be a list of [question, answer], but is {describe(value)}')
    if isinstance(value[0], dict):
        return turns(value, '"history"')
    dialogue: list[Turn] = []
    for number, pair in enumerate(value, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(f'{number} of "history" must be [question, answer], but is {describe(pair)}')
        question, answer = (sound_text(part, f'{number} of "history"').strip() for part in pair)
        dialogue += [Turn("user", question), Turn("assistant", answer)]
    return tuple(dialogue)


def from_text(value: Any) -> Any:
    """The list that text stands for, as tables have it: in JSON, or in Python as pandas writes it. Any other
    value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        for parse in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes that Python does not know
                if isinstance(found := parse(value.strip()), list):
                    return found
    return value


def messages_from_text(value: Any) -> Any:
    """`from_text` where the list holds messages; any other value as it is."""
    found = from_text(value)
    if not isinstance(found, list) or not found:
        return value
    return found if all(isinstance(m, dict) and {"role", "from"} & set(m) for m in found) else value
