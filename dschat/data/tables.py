"""Tables of text: CSV and TSV as rows under the names of their first line, all values strings or None."""

import csv
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, BinaryIO

from dschat.errors import UserError

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))


def table_rows(
    name: str, open_file: Callable[[], BinaryIO], delimiter: str | None
) -> Iterator[tuple[str, Any]]:
    """The rows, each with the line it begins on. Quoted fields may hold line breaks; an empty one is None.

    Without a `delimiter` it is the one of comma, semicolon and tab that the first line has most of. Raises
    `UserError` for a row with more or fewer fields than the first line.
    """
    with open_file() as file:
        yield from _rows(name, _decoded(name, file), delimiter)


def _rows(name: str, lines: Iterator[str], delimiter: str | None) -> Iterator[tuple[str, Any]]:
    first = next(lines, "")
    delimiter = delimiter or max(",;\t", key=first.count)
    reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    columns: list[str] = []
    line = 1
    try:
        for fields in reader:
            if fields and not columns:
                columns = _names(fields, f"{name}:{line}")
            elif fields:
                if len(fields) != len(columns):
                    raise UserError(
                        f"{name}:{line}: the row has {len(fields)} fields, but the first line names "
                        f"{len(columns)} columns. Correct the row: text that holds {_called(delimiter)} or a "
                        "line break stands between double quotes."
                    )
                yield f"{name}:{line}", {c: f or None for c, f in zip(columns, fields, strict=True)}
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{name}:{line}: the row cannot be read ({error}). Correct its quotes: text that holds any "
            "stands between double quotes, and they are doubled in it."
        ) from error


def _names(fields: list[str], place: str) -> list[str]:
    names = [field.strip() or f"column {number}" for number, field in enumerate(fields, start=1)]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"{place}: several columns are called {', '.join(repeated)}; rename them.")
    return names


def _called(delimiter: str) -> str:
    return {",": "a comma", ";": "a semicolon", "\t": "a tab"}[delimiter]


def _decoded(name: str, file: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name}:{number}: the text is not UTF-8; save the file in that encoding."
            ) from error
