"""File formats: JSON, JSON Lines, CSV and Parquet as a stream of rows, each with its place for messages.

A file of any size is read a piece at a time. To add a format, write a function from a name and what opens the
file to (place, row), and name it in `TEXT_KINDS`.
"""

import codecs
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from dschat.data.cells import BadRow
from dschat.data.packed import PACKED, open_unpacked, packing
from dschat.data.tables import table_rows
from dschat.errors import UserError

Rows = Callable[[], Iterator[tuple[str, Any]]]
"""Called, it streams (place, row); the place is for messages, such as "pairs.jsonl:3". A row that cannot be
read, while those after it can, is a `BadRow`."""
Open = Callable[[], BinaryIO]
"""Called, it gives a file's bytes from the beginning."""

KNOWN_FILES = ".json, .jsonl, .csv, .tsv (all also with .gz, .bz2, .xz, .zst) and .parquet"
ROWS_AT_ONCE = 1000
READ_AT_ONCE = 1 << 20
HEAD = 4096
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
GOES_ON = (
    "It goes on below: give each object on one line, or one list of objects; where the rows are in a field "
    'of one object, as in {"data": [...]}, save that list alone.'
)
BLANK = re.compile(r"[ \t\r\n]*")


def user_path(name: str) -> Path:
    """The path, with the home folder in place of ~; as it stands where there is no such user."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 - Path.expanduser raises there


def is_local(path: str | Path) -> bool:
    """Whether there is such a file or folder; a hub id, or what is too long for a path, is none."""
    return os.path.exists(path)  # noqa: PTH110 - Path.exists raises where a name is too long


def is_data_file(name: str) -> bool:
    """Whether the suffix of a name is that of a file format that is read."""
    return _kind_of(name) is not None


def stem_of(name: str) -> str:
    """The name of a data file without its suffixes."""
    suffixes = _kind_of(name)
    assert suffixes is not None
    return name[: -len("".join(suffixes))]


def _kind_of(name: str) -> tuple[str, str] | None:
    """The suffixes of a data file, of its kind and of its packing, None for another file."""
    packed = packing(name)
    kind = Path(name.lower().removesuffix(packed)).suffix
    if kind in TEXT_KINDS or (kind == PARQUET and not packed):
        return kind, packed
    return None


def file_rows(path: Path, flag: str, *, name: str | None = None) -> Rows:
    """The file's rows, by the suffix of its name, or by its first bytes where it has none.

    `name` stands for the path in messages. Raises `UserError` that names the flag for another kind of file.
    """
    name = name or str(path)
    kinds = _kind_of(name) if Path(name).suffix else _kind_by_content(path, name)
    if kinds is None:
        raise UserError(f"{flag} {name}: files of this kind are not read; give one of {KNOWN_FILES}.")
    kind, packed = kinds
    if kind == PARQUET:
        return partial(_parquet_rows, path, name)
    return partial(_text_rows, TEXT_KINDS[kind], path, packed, name)


def _kind_by_content(path: Path, name: str) -> tuple[str, str] | None:
    with readable(path, name):
        with path.open("rb") as file:
            head = file.read(8)
        packed = next((suffix for suffix, (_, _, magic) in PACKED.items() if head.startswith(magic)), "")
        with open_unpacked(path, packed) as file:
            head = file.read(HEAD)
    if head.startswith(b"PAR1"):
        return (PARQUET, "") if not packed else None
    is_json = head.removeprefix(BYTE_ORDER_MARK).lstrip(b" \t\r\n").startswith((b"[", b"{"))
    return (".json" if is_json or not head else ".csv"), packed


def _text_rows(
    rows: Callable[[str, Open], Iterator[tuple[str, Any]]], path: Path, packed: str, name: str
) -> Iterator[tuple[str, Any]]:
    with readable(path, name, packed):
        yield from rows(name, partial(open_unpacked, path, packed))


def _parquet_rows(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    with readable(path, name):
        try:
            parts = pq.ParquetFile(path).iter_batches(ROWS_AT_ONCE)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name}: a name of a column is not UTF-8, so the Parquet file is damaged; write it again."
            ) from error
        yield from arrow_rows(parts, name)


def arrow_rows(parts: Iterable[pa.RecordBatch | pa.Table], name: str) -> Iterator[tuple[str, Any]]:
    """Rows of Arrow tables with their numbers from 1; a `BadRow` for one that Python cannot hold."""
    number = 0
    for part in parts:
        try:
            rows = part.to_pylist()
        except (ValueError, OverflowError):  # text that is not UTF-8, a date beyond the year 9999
            rows = map(_one_row, (part.slice(index, 1) for index in range(part.num_rows)))
        for row in rows:
            number += 1
            yield f"{name}, row {number}", row


def _one_row(part: pa.RecordBatch | pa.Table) -> Any:
    try:
        return part.to_pylist()[0]
    except (ValueError, OverflowError) as error:
        return BadRow(f"a value cannot be read ({error})")


def sound_rows(rows: Rows) -> Iterator[tuple[str, Any]]:
    """Rows with their places. Raises `UserError` for a row that cannot be read."""
    for place, row in rows():
        if isinstance(row, BadRow):
            raise UserError(f"{place}: {row}. Correct the row or remove it.")
        yield place, row


def _json_rows(path: str, open_file: Open) -> Iterator[tuple[str, Any]]:
    """One object a line, streamed; or, where the file begins with a bracket, the elements of one list."""
    with open_file() as file:
        is_list = file.read(HEAD).removeprefix(BYTE_ORDER_MARK).lstrip(b" \t\r\n").startswith(b"[")
    with open_file() as file:
        yield from (_elements if is_list else _lines)(path, file)


def _lines(path: str, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    is_first = True
    for number, line in enumerate(file, 1):
        row: Any
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if not text:
                continue
            row = json.loads(text)
        except UnicodeDecodeError:
            row = BadRow("the text is not UTF-8; save the file in that encoding")
        except json.JSONDecodeError as error:
            problem = f"not a JSON object on one line ({error.msg} at character {error.pos + 1})"
            if is_first and text.startswith("{") and error.pos >= len(text) and file.readline():
                raise UserError(f"{path}:{number}: {problem}. {GOES_ON}") from error
            row = BadRow(problem)
        except (RecursionError, ValueError) as error:
            row = BadRow(f"the JSON cannot be read ({_too_much(error)})")
        is_first = False
        yield f"{path}:{number}", row


def _elements(path: str, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """The elements of one JSON list, each with the line it begins on; no more than a few are held at once."""
    text = _TextWindow(path, file)
    try:
        text.skip("[")
        while text.peek() != "]":
            yield f"{path}:{text.line}", text.decode()
            if text.peek() == ",":
                text.skip(",")
                if text.peek() == "]":
                    raise text.error("there is a comma, but no element after it")
            elif text.peek() != "]":
                raise text.error("a comma or the closing bracket is missing")
        text.skip("]")
        if text.peek():
            raise text.error("there is more text after the list")
    except (RecursionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path}:{text.line}: the JSON cannot be read ({_too_much(error)}). Correct it there."
        ) from error


def _too_much(error: RecursionError | ValueError) -> str:
    """Reason why Python's JSON decoder fails on text whose syntax is sound."""
    is_deep = isinstance(error, RecursionError)
    return "it is nested too deep" if is_deep else "it holds a number of thousands of digits"


class _TextWindow:
    """A moving window on a file's JSON text."""

    def __init__(self, path: str, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._decode_bytes = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self._position, self._at_end = "", 0, False
        self.line = 1

    def peek(self) -> str:
        """The next character that is no white space, "" at the end."""
        while True:
            blank = BLANK.match(self._text, self._position)
            end = blank.end() if blank else self._position
            self.line += self._text.count("\n", self._position, end)
            self._position = end
            if end < len(self._text) or not self._more():
                return self._text[end : end + 1]

    def skip(self, character: str) -> None:
        """Step over that character, which must come next."""
        assert self.peek() == character
        self._position += 1

    def decode(self) -> Any:
        """The JSON value that comes next."""
        self.peek()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                if self._may_be_cut_off(error) and self._more():
                    continue
                raise self.error(error.msg, error.pos) from error
            if end + 2 < len(self._text) or not self._more():  # a number may go on: 1 with .5, e5 or e+5
                break
        self.line += self._text.count("\n", self._position, end)
        self._position = end
        return value

    def _may_be_cut_off(self, error: json.JSONDecodeError) -> bool:
        """Whether more text could mend it: a string without its end, or a fault at the window's very end."""
        return error.msg.startswith("Unterminated string") or error.pos > len(self._text) - 16

    def error(self, message: str, position: int | None = None) -> UserError:
        """What is wrong at the position, by default the current one."""
        position = self._position if position is None else position
        line = self.line + self._text.count("\n", self._position, position)
        return UserError(f"{self._path}:{line}: not a JSON list of objects ({message}). Correct it there.")

    def _more(self) -> bool:
        """Double the window, so that a long value is decoded few times; False at the end of the file."""
        if self._at_end:
            return False
        self._text = self._text[self._position :]
        self._position = 0
        chunk = self._file.read(max(READ_AT_ONCE, len(self._text)))
        self._at_end = not chunk
        try:
            self._text += self._decode_bytes(chunk, self._at_end)
        except UnicodeDecodeError as error:
            line = self.line + self._text.count("\n") + chunk.count(b"\n", 0, error.start)
            raise UserError(
                f"{self._path}:{line}: the text is not UTF-8; save the file in that encoding."
            ) from error
        return True


@contextmanager
def readable(path: Path, name: str | None = None, packed: str = "") -> Iterator[None]:
    """Turn failures to read a file's bytes into `UserError`; `name` stands for the path there."""
    name = name or str(path)
    packed = packed or packing(name)
    program = PACKED[packed][0] if packed else "packed"
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(
            f"{name}: the {program} file is damaged ({error}); fetch or pack it again."
        ) from error
    except pa.ArrowException as error:
        raise UserError(f"{name}: the Parquet file cannot be read ({error}); write it again.") from error
    except OSError as error:
        if error.errno is None and packed:
            raise UserError(
                f"{name}: the {program} file is damaged ({error}); fetch or pack it again."
            ) from error
        raise UserError(
            f"{name}: it cannot be read ({error.strerror or error}); correct the path or its permissions."
        ) from error


PARQUET = ".parquet"
TEXT_KINDS: dict[str, Callable[[str, Open], Iterator[tuple[str, Any]]]] = {
    ".json": _json_rows,
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".csv": partial(table_rows, delimiter=None),
    ".tsv": partial(table_rows, delimiter="\t"),
}
"""What reads the bytes of a file of text, by its suffix."""
