"""Data sets that flags name, opened as training and evaluation rows.

An entry (`dschat.data.entries`) is a local file, a pattern of files, a pipe, a folder that `datasets` saved
or that holds files, or else the id of a data set on the hub.
"""

from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dschat.data.entries import OPTIONS, Entry, parse_entry
from dschat.data.files import Rows, arrow_rows, file_rows, is_data_file, readable, user_path
from dschat.data.folders import Folder, configuration, is_pattern, read_folder, read_pattern
from dschat.data.hub import load_from_hub
from dschat.data.known_sets import KNOWN_SETS, KnownSet
from dschat.data.layouts import ReadRow
from dschat.data.packed import packing
from dschat.data.pipes import is_pipe, spooled
from dschat.data.split_names import choose_splits, split_of
from dschat.errors import UserError
from dschat.fingerprint import files_fingerprint

if TYPE_CHECKING:
    import datasets

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
    splits: str = ""
    """The splits that are used, where it has names for them."""
    unused: tuple[str, ...] = ()
    """Names of splits that are neither for training nor for evaluation."""
    weight: float | None = None
    """Its share of a blend, None where none is given."""
    read: ReadRow | None = None
    """How its rows are read, None where their columns are to tell."""


def open_source(
    text: str, flag: str = "--data_path", *, evaluates: bool = False, config_name: str | None = None
) -> Source:
    """Find out what `text`, a value of `flag`, is and open it; rows are read later. Raises `UserError`.

    `evaluates` says that it is for evaluation only; `config_name` is the configuration where the text names
    none.
    """
    entry = parse_entry(text, flag, evaluates=evaluates)
    if config_name is not None and entry.config is None:
        entry = replace(entry, config=config_name)
    return replace(_open(entry), weight=entry.weight)


def _open(entry: Entry) -> Source:
    path = user_path(entry.name)
    with readable(path):
        if not path.exists() and is_pattern(entry.name):
            _refuse(entry, "config", "revision", what="a pattern of files")
            return _files_source(entry, read_pattern(entry))
        if is_pipe(path):
            _refuse(entry, *OPTIONS, what="a pipe")
            content = Path(f"/proc/self/fd/{spooled(path, entry.flag).fileno()}")
            return _file_source(entry, content)
        if path.is_file():
            _refuse(entry, *OPTIONS, what="a file")
            return _file_source(entry, path)
        if path.is_dir():
            _refuse(entry, "revision", what="a folder")
            return _local_source(entry, path if entry.config is None else configuration(path, entry))
    if entry.name in KNOWN_SETS:
        return _known_source(KNOWN_SETS[entry.name], entry)
    if _is_path(entry.name):
        raise UserError(
            f"{entry}: there is no such file or folder, seen from {Path.cwd()}; correct the path."
        )
    return _dataset_source(entry, load_from_hub(entry, {"path": entry.name}))


def _refuse(entry: Entry, *options: str, what: str) -> None:
    """Raise `UserError` for an option that means nothing there."""
    given = [option for option in options if getattr(entry, option) is not None]
    if given:
        raise UserError(f"{entry}: {what} has no {given[0]}; leave {given[0]}= out.")


def _known_source(known: KnownSet, entry: Entry) -> Source:
    if known.local_files is not None:
        _refuse(entry, *OPTIONS, what="a pair of files")
        return _known_files(known.local_files, entry, known.read)
    loaded = load_from_hub(entry, known.load_options())
    if entry.split is not None:
        return replace(_dataset_source(entry, loaded), read=known.read)
    present = {name: split for name, split in loaded.items() if name in (*known.training, *known.evaluation)}
    if not any(name in present for name in known.training):
        raise UserError(
            f"{entry}: the hub's data set has no split {' or '.join(known.training)} any more "
            f"(found: {', '.join(loaded)}); download it and give its files."
        )
    opened = {name: _split_rows(entry, name, split) for name, split in present.items()}
    return _assembled(
        entry,
        training=[opened[name] for name in known.training if name in opened],
        evaluation=[opened[name] for name in known.evaluation if name in opened],
        unused=tuple(sorted(set(loaded) - set(present))),
        read=known.read,
    )


def _known_files(local_files: tuple[str, str], entry: Entry, read: ReadRow) -> Source:
    """DeepSpeed-Chat's local/jsonfile: files at fixed places below the working directory."""
    training, evaluation = map(Path, local_files)
    if not training.is_file():
        raise UserError(
            f"{entry} reads {training} and, if it is there, {evaluation}, seen from {Path.cwd()}; there is "
            "no such file. Put it there, or give the path of a file instead."
        )
    parts = [
        [(file_rows(path, entry.flag), [path])] if path.is_file() else [] for path in (training, evaluation)
    ]
    return _assembled(entry, training=parts[0], evaluation=parts[1], read=read)


def _assembled(
    entry: Entry,
    *,
    training: list[tuple[Rows, list[Path]]],
    evaluation: list[tuple[Rows, list[Path]]],
    splits: str = "",
    unused: tuple[str, ...] = (),
    read: ReadRow | None = None,
) -> Source:
    """A source of splits, each given as its rows and the files that hold them."""
    return Source(
        name=entry.label,
        training=_chained([rows for rows, _ in training]),
        evaluation=_chained([rows for rows, _ in evaluation]) if evaluation else None,
        # Split by split, so that the same file for another use is another source.
        fingerprint="/".join(files_fingerprint(files) for _, files in [*training, *evaluation]),
        flag=entry.flag,
        splits=splits,
        unused=unused,
        read=read,
    )


def _is_path(name: str) -> bool:
    """Whether it cannot be a hub id, which has one slash at most and no file suffix."""
    return (
        name.startswith(("/", ".", "~")) or name.count("/") > 1 or is_data_file(name) or bool(packing(name))
    )


def _file_source(entry: Entry, path: Path) -> Source:
    rows = file_rows(path, entry.flag, name=entry.name)
    return Source(entry.label, rows, None, files_fingerprint([path]), entry.flag)


def _local_source(entry: Entry, path: Path) -> Source:
    """A folder that `datasets` saved, a folder of such folders, or one of files."""
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _dataset_source(entry, _saved(entry, path))
    splits: dict[str, list[tuple[Rows, list[Path]]]] = {}
    for part in sorted(folder for folder in path.iterdir() if (folder / "state.json").is_file()):
        splits.setdefault(split_of(part.name), []).append(_split_rows(entry, part.name, _saved(entry, part)))
    if not splits:
        return _files_source(entry, read_folder(path, entry))
    joined = {name: zip(*parts, strict=True) for name, parts in splits.items()}
    return _source_of_splits(
        entry, {name: (_chained(list(rows)), list(chain(*files))) for name, (rows, files) in joined.items()}
    )


def _saved(entry: Entry, path: Path) -> Any:
    """What `datasets` saved there."""
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # of files that are not what it wrote, datasets makes what it likes
        raise UserError(f"{entry}: the saved data set cannot be read ({error}); save it again.") from error


def _files_source(entry: Entry, folder: Folder) -> Source:
    opened = {
        name: (_chained([file_rows(file, entry.flag) for file in files]), files)
        for name, files in folder.splits.items()
    }
    return _source_of_splits(entry, opened, folder.unused)


def _dataset_source(entry: Entry, loaded: "datasets.Dataset | datasets.DatasetDict") -> Source:
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    return _source_of_splits(entry, {name: _split_rows(entry, name, split) for name, split in splits.items()})


def _split_rows(entry: Entry, name: str, split: "datasets.Dataset") -> tuple[Rows, list[Path]]:
    """The rows of a split, and the files that hold them."""
    files = [Path(file["filename"]) for file in split.cache_files]
    return lambda: arrow_rows(split.with_format("arrow").iter(ROWS_AT_ONCE), f"{entry.name} {name}"), files


def _source_of_splits(
    entry: Entry, splits: dict[str, tuple[Rows, list[Path]]], unused: tuple[str, ...] = ()
) -> Source:
    """A source of named splits, each given as its rows and the files that hold them."""
    training, evaluation = choose_splits(list(splits), entry)

    def joined(names: list[str]) -> str:
        counts = {name: len(splits[name][1]) for name in names}
        return " + ".join(f"{name} ({n} files)" if n > 1 else name for name, n in counts.items())

    return _assembled(
        entry,
        training=[splits[name] for name in training],
        evaluation=[splits[name] for name in evaluation],
        splits=joined(training) + (f", evaluation on {joined(evaluation)}" if evaluation else ""),
        unused=(*sorted(set(splits) - {*training, *evaluation}), *unused),
    )


def _chained(parts: list[Rows]) -> Rows:
    return lambda: chain.from_iterable(part() for part in parts)
