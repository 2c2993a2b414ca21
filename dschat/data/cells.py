"""What is in the columns of a row, checked: text, numbers, and what is wrong with them."""

import math
import sys
from typing import Any

Row = dict[str, Any]


class BadRow(ValueError):
    """A row that cannot be read. The message says what is wrong; the reader adds file and line."""


class DroppedRow(Exception):
    """A sound row that is of no use here; the message is the reason it is counted under."""


def value_of(row: Row, column: str) -> Any:
    """What is in that column. Raises `BadRow` where there is none: rows need not be like the first."""
    if column not in row:
        raise BadRow(f'the row has no "{column}"')
    return row[column]


def is_blank(value: Any) -> bool:
    """Whether an optional value says nothing: null, NaN (as pandas has it), white space, an empty list."""
    if isinstance(value, float):
        return math.isnan(value)
    return not value.strip() if isinstance(value, str) else value is None or value in ([], {})


def text(row: Row, column: str) -> str:
    """The string in that column, which must hold more than white space. Raises `BadRow` for anything else."""
    return sound_text(value_of(row, column), f'"{column}"')


def sound_text(value: Any, name: str) -> str:
    """`value`, if it is a string with something in it; `name` says in a message what it is."""
    if not isinstance(value, str):
        raise BadRow(f"{name} must be a string, but is {describe(value)}")
    if not value.strip():
        raise BadRow(f"{name} is empty" + (" but for white space" if value else ""))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{name} holds half of a surrogate pair at character {error.start + 1}") from error
    return value


def finite_number(value: Any, name: str) -> float:
    """`value`, if it is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"{name} must be a number, but is {describe(value)}")
    # An int compares with any float, but is not always one: float(10**400) is an OverflowError.
    if not -sys.float_info.max <= value <= sys.float_info.max:
        raise BadRow(f"{name} must be a finite number, but is {describe(value)}")
    return float(value)


def describe(value: Any) -> str:
    """What a value is, for a message."""
    if value is None:
        return "null"
    names = {list: "a list", dict: "an object", bool: "true or false", int: "a number", float: "a number"}
    shown = repr(value)
    return f"{names.get(type(value), type(value).__name__)}: {shown[:60]}{'...' if len(shown) > 60 else ''}"
