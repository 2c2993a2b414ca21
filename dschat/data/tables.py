"""CSV and TSV as rows under the names of their first line; all values are strings or None."""

import csv
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, BinaryIO

from dschat.data.cells import BadRow, Row
from dschat.errors import UserError

PANDAS_INDEX = "__index_level_0__"
"""What Arrow calls the numbers of rows that pandas writes into a first column without a name."""

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))


def table_rows(
    name: str, open_file: Callable[[], BinaryIO], delimiter: str | None
) -> Iterator[tuple[str, Any]]:
    """The rows, each with the line it begins on. Quoted fields may hold line breaks; an empty one is None.

    Without a `delimiter` it is the one of comma, semicolon and tab that the first line has most of. A row
    with another number of fields than the first line is a `BadRow`. Raises `UserError` for unended quotes.
    """
    with open_file() as file:
        yield from _rows(name, _decoded(name, file), delimiter)


def _rows(name: str, lines: Iterator[str], delimiter: str | None) -> Iterator[tuple[str, Any]]:
    first = next(lines, "")
    delimiter = delimiter or max(",;\t", key=first.count)
    parsed = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    columns: list[str] = []
    line = 1
    try:
        for fields in parsed:
            if fields and not columns:
                columns = _names(fields, f"{name}:{line}")
            elif fields:
                yield f"{name}:{line}", _row(columns, fields, delimiter)
            line = parsed.line_num + 1
    except csv.Error as error:
        remedy = "Correct its quotes: text that holds any stands between double quotes, each doubled in it."
        if "new-line" in str(error):
            remedy = "Lines end with a carriage return alone; save the file with line feeds."
        raise UserError(f"{name}:{line}: the row cannot be read ({error}). {remedy}") from error


def _row(columns: list[str], fields: list[str], delimiter: str) -> Row | BadRow:
    if len(fields) != len(columns):
        called = {",": "a comma", ";": "a semicolon", "\t": "a tab"}[delimiter]
        return BadRow(
            f"the row has {len(fields)} fields, but the first line names {len(columns)} columns; text that "
            f"holds {called} or a line break stands between double quotes"
        )
    return {column: field or None for column, field in zip(columns, fields, strict=True)}


def _names(fields: list[str], place: str) -> list[str]:
    names = [field.strip() or f"column {number}" for number, field in enumerate(fields, start=1)]
    if not fields[0].strip():
        names[0] = PANDAS_INDEX
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"{place}: several columns are called {', '.join(repeated)}; rename them.")
    return names


def _decoded(name: str, file: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name}:{number}: the text is not UTF-8; save the file in that encoding."
            ) from error
