"""Sources: the entries of --data_path, each opened as training and evaluation rows.

An entry is a local JSON, JSON Lines or Parquet file (the first two also with .gz), a folder that `datasets`
saved or that holds train and test files, or else the id of a data set on the hub.
"""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from dschat.data.cache import files_fingerprint
from dschat.data.comparisons import Comparison
from dschat.data.layouts import BadRow, DroppedRow, recognise
from dschat.errors import UserError

Rows = Callable[[], Iterator[tuple[str, Any]]]
"""Called, it streams (place, row); the place is for messages, such as "pairs.jsonl:3"."""

EVALUATION_SPLITS = ("test", "validation", "valid", "val", "eval", "dev")
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
KNOWN_FILES = ".json, .jsonl (both also .gz) and .parquet"
ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Source:
    """One entry of --data_path."""

    name: str
    training: Rows
    evaluation: Rows | None
    """None where evaluation rows are not published apart."""
    fingerprint: str
    """Changes with the content, not with the name."""
    flag: str = "--data_path"
    """The flag that names it."""
    unused: tuple[str, ...] = ()
    """Names of splits that are neither for training nor for evaluation."""


def open_source(entry: str, flag: str = "--data_path") -> Source:
    """Find out what `entry` of `flag` is and open it; rows are read later. Raises `UserError`."""
    path = Path(entry).expanduser()
    with _readable(path):
        if path.is_file():
            return _file_source(entry, path, flag)
        if path.is_dir():
            saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
            return (_saved_source if saved else _folder_source)(entry, path, flag)
    if _is_path(entry):
        raise UserError(
            f"{flag} {entry}: there is no such file or folder, seen from {Path.cwd()}; correct the path."
        )
    return _hub_source(entry, flag)


def read_comparisons(rows: Rows, dropped: Counter[str]) -> Iterator[Comparison]:
    """Stream the rows as comparisons by the layout of the first; reasons to leave one out count in `dropped`.

    Raises `UserError` with file and line for what cannot be read.
    """
    read = None
    for place, row in rows():
        try:
            if not isinstance(row, dict):
                raise BadRow(f"the row is no JSON object, but {json.dumps(row)[:60]}")
            read = read or recognise(row)
            comparison = read(row)
        except BadRow as error:
            raise UserError(f"{place}: {error}. Correct the row or remove it.") from error
        except DroppedRow as reason:
            dropped[str(reason)] += 1
        else:
            yield comparison


def _is_path(entry: str) -> bool:
    """Whether it cannot be a hub id, which has one slash at most and no file suffix."""
    return (
        entry.startswith(("/", ".", "~"))
        or entry.count("/") > 1
        or entry.lower().endswith((*SUFFIXES, ".gz"))
    )


def _file_source(entry: str, path: Path, flag: str) -> Source:
    return Source(entry, _file_rows(path, flag), None, files_fingerprint([path]), flag)


def _folder_source(entry: str, path: Path, flag: str) -> Source:
    """A folder with files such as train.jsonl.gz or train-00000-of-00002.parquet, and test likewise."""
    files = _data_files(path)
    if not files and (path / "data").is_dir():  # where a data set downloaded from the hub has them
        files = _data_files(path / "data")
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(re.split(r"[-_.]", file.name.lower())[0], []).append(file)
    opened = {
        name: (_chained([_file_rows(file, flag) for file in files]), files) for name, files in splits.items()
    }
    return _source_of_splits(entry, flag, opened, "files")


def _data_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.name.lower().endswith(SUFFIXES))


def _saved_source(entry: str, path: Path, flag: str) -> Source:
    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(
            f"{flag} {entry}: the saved data set cannot be read ({error}); save it again."
        ) from error
    return _dataset_source(entry, saved, flag)


def _hub_source(entry: str, flag: str) -> Source:
    try:
        loaded = datasets.load_dataset(entry)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{flag} {entry}: there is no such file or folder here, and the hub gives no such data set "
            f"({type(error).__name__}: {error}). Correct the name, go online, or give a file ({KNOWN_FILES})."
        ) from error
    return _dataset_source(entry, loaded, flag)


def _dataset_source(entry: str, loaded: datasets.Dataset | datasets.DatasetDict, flag: str) -> Source:
    splits = {"train": loaded} if isinstance(loaded, datasets.Dataset) else loaded
    opened = {
        name: (partial(_dataset_rows, split, f"{entry} {name}"), _files_of(split))
        for name, split in splits.items()
    }
    return _source_of_splits(entry, flag, opened, "splits")


def _files_of(split: datasets.Dataset) -> list[Path]:
    return [Path(file["filename"]) for file in split.cache_files]


def _source_of_splits(entry: str, flag: str, splits: dict[str, tuple[Rows, list[Path]]], kind: str) -> Source:
    """A source of named splits, each given as its rows and the files that hold them."""
    training, evaluation = _choose_splits(list(splits), f"{flag} {entry}", kind)
    used = [training, *evaluation]
    return Source(
        name=entry,
        training=splits[training][0],
        evaluation=_chained([splits[name][0] for name in evaluation]) if evaluation else None,
        # Split by split, so that the same file for another use is another source.
        fingerprint="/".join(files_fingerprint(splits[name][1]) for name in used),
        flag=flag,
        unused=tuple(sorted(set(splits) - set(used))),
    )


def _choose_splits(names: list[str], where: str, kind: str) -> tuple[str, list[str]]:
    """The split to train on and those to evaluate on, of the names that are there."""
    evaluation = [name for name in EVALUATION_SPLITS if name in names]
    if "train" in names:
        return "train", evaluation
    if len(names) == 1 and not evaluation:
        return names[0], []
    found = ", ".join(sorted(names)) or "none"
    remedy = f"name a file ({KNOWN_FILES})" if kind == "files" else 'name the one to train on "train"'
    raise UserError(f"{where} has no {kind} called train (found: {found}); {remedy}.")


def _chained(parts: list[Rows]) -> Rows:
    return lambda: chain.from_iterable(part() for part in parts)


def _dataset_rows(split: datasets.Dataset, name: str) -> Iterator[tuple[str, Any]]:
    number = 0
    for table in split.with_format("arrow").iter(ROWS_AT_ONCE):
        for row in table.to_pylist():
            number += 1
            yield f"{name}, row {number}", row


def _file_rows(path: Path, flag: str) -> Rows:
    name = path.name.lower()
    if name.endswith(".parquet"):
        return partial(_parquet_rows, path)
    if name.endswith(SUFFIXES):
        return partial(_json_rows, path)
    raise UserError(f"{flag} {path}: files of this kind are not read; give one of {KNOWN_FILES}.")


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    with _readable(path):
        for batch in pq.ParquetFile(path).iter_batches(ROWS_AT_ONCE):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """One object a line, streamed; or, where the file begins with a bracket, the elements of one list."""
    with _readable(path):
        with _open(path) as file:
            is_list = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        with _open(path) as file:
            yield from (_elements if is_list else _lines)(path, file)


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if text:
                yield f"{path}:{number}", json.loads(text)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, number) from error
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{number}: not a JSON object on one line ({error.msg} at character {error.pos + 1}). "
                "Correct the line, or give one list of objects."
            ) from error
        except (RecursionError, ValueError) as error:  # nested too deep; a number of thousands of digits
            raise UserError(
                f"{path}:{number}: the JSON cannot be read ({error}). Correct the line."
            ) from error


def _elements(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, data.count(b"\n", 0, error.start) + 1) from error
    try:
        for line, element in _list_elements(text):
            yield f"{path}:{line}", element
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not a JSON list ({error.msg} at character {error.colno} of the line). "
            "Correct it there."
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deep; a number of thousands of digits
        raise UserError(f"{path}: the JSON cannot be read ({error}). Correct the file.") from error


def _list_elements(text: str) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON list, decoded one at a time, each with the line it begins on."""
    decode, blank = json.JSONDecoder().raw_decode, re.compile(r"[ \t\r\n]*")
    position = blank.match(text, text.index("[") + 1).end()
    line = 1 + text.count("\n", 0, position)
    while text[position : position + 1] != "]":
        element, end = decode(text, position)
        yield line, element
        end = blank.match(text, end).end()
        if text[end : end + 1] not in ("]", ","):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, end)
        following = end if text[end] == "]" else blank.match(text, end + 1).end()
        if text[end] == "," and text[following : following + 1] == "]":
            raise json.JSONDecodeError("Expecting another element", text, following)
        line, position = line + text.count("\n", position, following), following
    end = blank.match(text, position + 1).end()
    if end < len(text):
        raise json.JSONDecodeError("Extra data", text, end)


def _not_utf8(path: Path, line: int) -> UserError:
    return UserError(f"{path}:{line}: the text is not UTF-8; save the file in that encoding.")


def _open(path: Path) -> BinaryIO:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn failures to read a file's bytes into `UserError`."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: the gzip file is damaged ({error}); fetch or pack it again.") from error
    except pa.ArrowException as error:
        raise UserError(f"{path}: the Parquet file cannot be read ({error}); write it again.") from error
    except OSError as error:
        raise UserError(f"{path}: the file cannot be read ({error.strerror or error}).") from error
