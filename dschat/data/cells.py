"""Values of a row's columns, checked: text, numbers, and the error for a bad one."""

import math
import re
from typing import Any

LARGEST = 3.4028234663852886e38
"""The largest float32: losses and scores are computed in no wider a range."""
NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")

Row = dict[str, Any]


class Columns(dict[str, Any]):
    """A row that records which columns are read by name. `in`, iteration and copies are not recorded."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self.asked: set[str] = set()

    def __getitem__(self, column: str) -> Any:
        self.asked.add(column)
        return super().__getitem__(column)

    def get(self, column: str, default: Any = None) -> Any:
        """The value as `dict.get` gives it; records the read."""
        self.asked.add(column)
        return super().get(column, default)


def replaced(row: Row, **values: Any) -> Row:
    """A copy of the row with other values in some columns; reads of the copy are recorded for the row."""
    other = Columns({**row, **values})
    if isinstance(row, Columns):
        other.asked = row.asked
    return other


class BadRow(ValueError):
    """A row that cannot be read. The message says what is wrong; file and line are added later."""

    @property
    def reason(self) -> str:
        """The message without values, such that rows with the same fault have the same reason."""
        return re.sub(r"\b\d+\b", "N", re.split(r", but |; |: | \(", str(self))[0])


class DroppedRow(Exception):
    """A sound row that no step can use; the message is the reason under which it is counted."""


def value_of(row: Row, column: str) -> Any:
    """The value in a column. Raises `BadRow` for a row without it: rows need not be like the first."""
    if column not in row:
        raise BadRow(f'the row has no "{column}"')
    return row[column]


def is_blank(value: Any) -> bool:
    """Whether a value counts as absent: null, NaN (as pandas has it), blank text, an empty list or object."""
    if isinstance(value, float):
        return math.isnan(value)
    return not value.strip() if isinstance(value, str) else value is None or value in ([], {})


def text(row: Row, column: str) -> str:
    """The string in that column, which must hold more than white space. Raises `BadRow` for anything else."""
    return sound_text(value_of(row, column), f'"{column}"')


def sound_text(value: Any, name: str) -> str:
    """`value` if it is a string of more than white space. Raises `BadRow`, which calls the value `name`."""
    if not isinstance(value, str):
        raise BadRow(f"{name} must be a string, but is {describe(value)}")
    if not value.strip():
        raise BadRow(f"{name} is empty" + (" but for white space" if value else ""))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{name} holds half of a surrogate pair at character {error.start + 1}") from error
    return value


def optional(row: Row, column: str) -> Any:
    """The value in a column, None where it is absent or blank."""
    value = row.get(column)
    return None if is_blank(value) else value


def has(row: Row, *columns: str) -> bool:
    """Whether the row has all the columns and none is blank; records no read."""
    return all(column in row and not is_blank(dict.__getitem__(row, column)) for column in columns)


def first_filled(row: Row, *columns: str) -> str | None:
    """The name of the first column that is not blank, None where all are; records no read."""
    return next((column for column in columns if has(row, column)), None)


def finite_number(value: Any, name: str) -> float:
    """`value` as a float if it is a number, or text of one, that is finite in float32. Raises `BadRow`."""
    if isinstance(value, str) and NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"{name} must be a number, but is {describe(value)}")
    # An int compares with any float, but is not always one: float(10**400) is an OverflowError.
    if not -LARGEST <= value <= LARGEST:
        raise BadRow(f"{name} must be a finite number (within 3.4e38, as float32), but is {describe(value)}")
    return float(value)


def describe(value: Any) -> str:
    """A value's kind and its beginning, for a message."""
    if value is None:
        return "null"
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    names = {list: "a list", dict: "an object", bool: "true or false", int: "a number", float: "a number"}
    shown = repr(value)
    return f"{names.get(type(value), type(value).__name__)}: {shown[:60]}{'...' if len(shown) > 60 else ''}"
