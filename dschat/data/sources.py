"""Sources: the entries of --data_path, each opened as training and evaluation rows.

An entry is a local JSON, JSON Lines or Parquet file (the first two also with .gz), a folder that `datasets`
saved or that holds train and test files, or else the id of a data set on the hub; with a weight behind it as
in "pairs.jsonl:0.3".
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import datasets

from dschat.arguments import DataArguments
from dschat.data.cache import files_fingerprint
from dschat.data.cells import BadRow, DroppedRow
from dschat.data.comparisons import Comparison
from dschat.data.files import KNOWN_FILES, SUFFIXES, Rows, arrow_rows, file_rows, readable, user_path
from dschat.data.known_sets import KNOWN_SETS, KnownSet
from dschat.data.layouts import LAYOUTS, ReadRow, recognise
from dschat.data.tools import with_tools
from dschat.errors import UserError

EVALUATION_SPLITS = ("test", "validation", "valid", "val", "eval", "dev")
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
    weight: float | None = None
    """Its share of a blend, None where none is given."""
    read: ReadRow | None = None
    """How its rows are read, None where their columns are to tell."""


@dataclass(frozen=True)
class Format:
    """How the user says that rows are to be read, where the columns do not tell."""

    name: str | None = None
    """A layout or a known data set, None for what the columns tell."""
    keys: tuple[tuple[str, str], ...] = ()
    """(the name a layout uses, the name in the data) of columns."""
    keep_rows: bool = False
    """Whether comparisons keep the rows that they were made of."""

    @staticmethod
    def of(data: DataArguments) -> "Format":
        """From --data_format and the flags that name columns. Raises `UserError` for an unknown format."""
        if data.data_format is not None and data.data_format not in {**LAYOUTS, **KNOWN_SETS}:
            raise UserError(
                f"--data_format {data.data_format!r} is unknown; choose a layout ({', '.join(LAYOUTS)}) or a "
                f"known data set ({', '.join(KNOWN_SETS)})."
            )
        keys = {
            "prompt": data.prompt_key,
            "chosen": data.chosen_key,
            "rejected": data.rejected_key,
            "messages": data.messages_key,
        }
        return Format(data.data_format, tuple((ours, theirs) for ours, theirs in keys.items() if theirs))

    def reader(self) -> ReadRow | None:
        """What reads a row, None where the columns are to tell."""
        if self.name is None:
            return None
        return (LAYOUTS if self.name in LAYOUTS else KNOWN_SETS)[self.name].read

    def renamed(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row under the names that layouts use. Raises `BadRow` for a missing column."""
        for ours, theirs in self.keys:
            if theirs not in row:
                raise BadRow(f'the row has no "{theirs}" (--{ours}_key)')
        return {**row, **{ours: row[theirs] for ours, theirs in self.keys}} if self.keys else row


def open_source(entry: str, flag: str = "--data_path", *, config_name: str | None = None) -> Source:
    """Find out what `entry` of `flag` is and open it; rows are read later. Raises `UserError`.

    With `config_name` it is a hub id, of whose configurations that one is meant.
    """
    if config_name is not None:
        loaded = _load_from_hub(entry, flag, {"path": entry, "name": config_name})
        return _dataset_source(entry, loaded, flag)
    with readable(Path(entry)):  # a name may be too long for a path
        name, weight = _weighted(entry, flag)
    return replace(_open_unweighted(name, flag), weight=weight)


def _weighted(entry: str, flag: str) -> tuple[str, float | None]:
    """An entry as its name and its weight."""
    name, colon, number = entry.rpartition(":")
    if not colon or user_path(entry).exists():
        return entry, None
    if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", number, re.IGNORECASE):
        if user_path(name).exists():
            raise UserError(f"{flag} {entry}: the weight must be a number, got {number!r}; 0.3 is one.")
        return entry, None
    if not 0 < float(number) < float("inf"):
        raise UserError(f"{flag} {entry}: the weight must be positive, got {number}; 0.3 is one.")
    return name, float(number)


def _open_unweighted(entry: str, flag: str) -> Source:
    path = user_path(entry)
    with readable(path):
        if path.is_file():
            return _file_source(entry, path, flag)
        if path.is_dir():
            saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
            return (_saved_source if saved else _folder_source)(entry, path, flag)
    if entry in KNOWN_SETS:
        return _known_source(KNOWN_SETS[entry], flag)
    if _is_path(entry):
        raise UserError(
            f"{flag} {entry}: there is no such file or folder, seen from {Path.cwd()}; correct the path."
        )
    return _hub_source(entry, flag)


def read_comparisons(source: Source, rows: Rows, form: Format, dropped: Counter[str]) -> Iterator[Comparison]:
    """Stream the source's rows as comparisons; reasons to leave one out count in `dropped`.

    Raises `UserError` with file and line for what cannot be read.
    """
    for place, found in read_rows(source, rows, form):
        if isinstance(found, BadRow):
            raise UserError(f"{place}: {found}. Correct the row or remove it.") from found
        if isinstance(found, DroppedRow):
            dropped[str(found)] += 1
        else:
            yield found


def read_rows(
    source: Source, rows: Rows, form: Format
) -> Iterator[tuple[str, Comparison | BadRow | DroppedRow]]:
    """Stream what the source's rows are, each with its place.

    They are read as `form` says, else as is known of the source, else by the columns of the first row.
    """
    read, layout = form.reader() or source.read, None
    for place, row in rows():
        try:
            if not isinstance(row, dict):
                raise BadRow(f"the row is no JSON object, but {json.dumps(row)[:60]}")
            kept = json.dumps(row, default=str) if form.keep_rows else None
            row = form.renamed(row)
            if read is None:
                layout = recognise(row)
                read = layout.read
            elif layout is LAYOUTS["prompt_only"] and (other := recognise(row)) is not layout:
                raise BadRow(
                    f"the row has {', '.join(other.columns)}, but the first row a prompt alone, so the "
                    "layout is prompt_only; put rows with answers into another file, or give --data_format "
                    "prompt_only to use their prompts alone"
                )
            found = with_tools(read(row), row)
            yield place, replace(found, row=kept) if form.keep_rows else found
        except (BadRow, DroppedRow) as problem:
            yield place, problem


def _known_source(known: KnownSet, flag: str) -> Source:
    if known.local_files is not None:
        return _known_files(known, flag)
    loaded = _load_from_hub(known.name, flag, known.load_options())
    present = {name: split for name, split in loaded.items() if name in (*known.training, *known.evaluation)}
    if not any(name in present for name in known.training):
        raise UserError(
            f"{flag} {known.name}: the hub's data set has no split {' or '.join(known.training)} any more "
            f"(found: {', '.join(loaded)}); download it and give its files."
        )
    opened = {name: _split_rows(known.name, name, split) for name, split in present.items()}
    return _assembled(
        known.name,
        flag,
        training=[opened[name] for name in known.training if name in opened],
        evaluation=[opened[name] for name in known.evaluation if name in opened],
        unused=tuple(sorted(set(loaded) - set(present))),
        read=known.read,
    )


def _known_files(known: KnownSet, flag: str) -> Source:
    """DeepSpeed-Chat's local/jsonfile: files at fixed places below the working directory."""
    training, evaluation = (Path(name) for name in known.local_files)
    if not training.is_file():
        raise UserError(
            f"{flag} {known.name} reads {training} and, if it is there, {evaluation}, seen from "
            f"{Path.cwd()}; there is no such file. Put it there, or give the path of a file instead."
        )
    parts = [[(file_rows(path, flag), [path])] if path.is_file() else [] for path in (training, evaluation)]
    return _assembled(known.name, flag, training=parts[0], evaluation=parts[1], read=known.read)


def _assembled(
    name: str,
    flag: str,
    *,
    training: list[tuple[Rows, list[Path]]],
    evaluation: list[tuple[Rows, list[Path]]],
    unused: tuple[str, ...] = (),
    read: ReadRow | None = None,
) -> Source:
    """A source of splits, each given as its rows and the files that hold them."""
    return Source(
        name=name,
        training=_chained([rows for rows, _ in training]),
        evaluation=_chained([rows for rows, _ in evaluation]) if evaluation else None,
        # Split by split, so that the same file for another use is another source.
        fingerprint="/".join(files_fingerprint(files) for _, files in [*training, *evaluation]),
        flag=flag,
        unused=unused,
        read=read,
    )


def _is_path(entry: str) -> bool:
    """Whether it cannot be a hub id, which has one slash at most and no file suffix."""
    return (
        entry.startswith(("/", ".", "~"))
        or entry.count("/") > 1
        or entry.lower().endswith((*SUFFIXES, ".gz"))
    )


def _file_source(entry: str, path: Path, flag: str) -> Source:
    return Source(entry, file_rows(path, flag), None, files_fingerprint([path]), flag)


def _folder_source(entry: str, path: Path, flag: str) -> Source:
    """A folder with files such as train.jsonl.gz or train-00000-of-00002.parquet, and test likewise."""
    files = _data_files(path)
    if not files and (path / "data").is_dir():  # where a data set downloaded from the hub has them
        files = _data_files(path / "data")
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(re.split(r"[-_.]", file.name.lower())[0], []).append(file)
    opened = {
        name: (_chained([file_rows(file, flag) for file in files]), files) for name, files in splits.items()
    }
    return _source_of_splits(entry, flag, opened, "files")


def _data_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.name.lower().endswith(SUFFIXES))


def _saved_source(entry: str, path: Path, flag: str) -> Source:
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # of files that are not what it wrote, datasets makes what it likes
        raise UserError(
            f"{flag} {entry}: the saved data set cannot be read ({error}); save it again."
        ) from error
    return _dataset_source(entry, saved, flag)


def _hub_source(entry: str, flag: str) -> Source:
    return _dataset_source(entry, _load_from_hub(entry, flag, {"path": entry}), flag)


def _load_from_hub(entry: str, flag: str, options: dict[str, str]) -> datasets.Dataset | datasets.DatasetDict:
    """`options` are those of `datasets.load_dataset`."""
    try:
        return datasets.load_dataset(**options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{flag} {entry}: there is no such file or folder here, and the hub gives no such data set "
            f"({type(error).__name__}: {error}). Correct the name, go online, or give a file ({KNOWN_FILES})."
        ) from error


def _dataset_source(entry: str, loaded: datasets.Dataset | datasets.DatasetDict, flag: str) -> Source:
    splits = {"train": loaded} if isinstance(loaded, datasets.Dataset) else loaded
    opened = {name: _split_rows(entry, name, split) for name, split in splits.items()}
    return _source_of_splits(entry, flag, opened, "splits")


def _split_rows(entry: str, name: str, split: datasets.Dataset) -> tuple[Rows, list[Path]]:
    """The rows of a split, and the files that hold them."""
    files = [Path(file["filename"]) for file in split.cache_files]
    return partial(_dataset_rows, split, f"{entry} {name}"), files


def _source_of_splits(entry: str, flag: str, splits: dict[str, tuple[Rows, list[Path]]], kind: str) -> Source:
    """A source of named splits, each given as its rows and the files that hold them."""
    training, evaluation = _choose_splits(list(splits), f"{flag} {entry}", kind)
    return _assembled(
        entry,
        flag,
        training=[splits[training]],
        evaluation=[splits[name] for name in evaluation],
        unused=tuple(sorted(set(splits) - {training, *evaluation})),
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
    yield from arrow_rows(split.with_format("arrow").iter(ROWS_AT_ONCE), name)
