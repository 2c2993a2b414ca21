"""Layouts: how a row of a data set becomes a Comparison. Each is one small function, known by its columns.

To add one, write a function from a row to a Comparison and put `@layout(column, ...)` above it. Where several
fit a row, the one that was registered first is taken, so the more columns, the earlier.
"""

from collections.abc import Callable
from typing import Any

from dschat.data.comparisons import Comparison

Row = dict[str, Any]
Layout = Callable[[Row], Comparison]

LAYOUTS: dict[tuple[str, ...], Layout] = {}
"""The known layouts by the columns they need."""

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class BadRow(ValueError):
    """A row that cannot be read. The message says what is wrong; the reader adds file and line."""


class DroppedRow(Exception):
    """A sound row that is of no use here; the message is the reason it is counted under."""


def layout(*columns: str) -> Callable[[Layout], Layout]:
    """Register the function below as the layout of rows with these columns."""

    def register(read: Layout) -> Layout:
        LAYOUTS[columns] = read
        return read

    return register


def recognise(row: Row) -> Layout:
    """The layout of a row by its columns. Raises `BadRow` where none fits."""
    for columns, read in LAYOUTS.items():
        if set(columns) <= set(row):
            return read
    known = "; or ".join(", ".join(columns) for columns in LAYOUTS)
    closest = max(LAYOUTS, key=lambda columns: len(set(columns) & set(row)))
    missing = ", ".join(f'"{column}"' for column in closest if column not in row)
    found = ", ".join(map(str, row)) or "none"
    raise BadRow(f"the row has no {missing}; its columns are: {found}; the known layouts are: {known}")


def text(row: Row, column: str) -> str:
    """The non-empty string in that column. Raises `BadRow` for anything else."""
    if column not in row:
        raise BadRow(f'the row has no "{column}"')
    value = row[column]
    if not isinstance(value, str):
        raise BadRow(f'"{column}" must be a string, but is {_describe(value)}')
    if not value:
        raise BadRow(f'"{column}" is empty')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f'"{column}" holds half of a surrogate pair at character {error.start + 1}') from error
    return value


def _describe(value: Any) -> str:
    if value is None:
        return "null"
    names = {list: "a list", dict: "an object", bool: "true or false", int: "a number", float: "a number"}
    shown = repr(value)
    return f"{names.get(type(value), type(value).__name__)}: {shown[:60]}{'...' if len(shown) > 60 else ''}"


@layout("prompt", "chosen", "rejected")
def answers_to_a_prompt(row: Row) -> Comparison:
    """Three strings, taken as they are."""
    return Comparison(text(row, "prompt"), text(row, "chosen"), text(row, "rejected"))


@layout("chosen", "rejected")
def whole_dialogues(row: Row) -> Comparison:
    """Two dialogues "\\n\\nHuman: ...\\n\\nAssistant: ..." as in HH that differ in the last answer.

    The prompt ends with "\\n\\nAssistant:" and the answers begin with their space. Dialogues that part
    earlier compare answers to different prompts and are dropped.
    """
    prompt, chosen = _last_answer(row, "chosen")
    other_prompt, rejected = _last_answer(row, "rejected")
    if prompt != other_prompt:
        raise DroppedRow("dialogues that part before their last answer")
    return Comparison(prompt, chosen, rejected)


def _last_answer(row: Row, column: str) -> tuple[str, str]:
    before, marker, answer = text(row, column).rpartition(ASSISTANT)
    if not marker:
        raise BadRow(
            f'"{column}" holds no {ASSISTANT!r}, and the row no "prompt"; '
            "give whole dialogues, or the prompt in a column of its own"
        )
    if HUMAN in answer:
        raise DroppedRow("dialogues that end with a question")
    if not answer:
        raise BadRow(f'"{column}" has no answer after its last {ASSISTANT!r}')
    return before + marker, answer
