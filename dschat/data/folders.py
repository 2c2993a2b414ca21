"""Folders and patterns of files, sorted into splits."""

import glob
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dschat.data.entries import Entry
from dschat.data.files import KNOWN_FILES, is_data_file, stem_of, user_path
from dschat.data.split_names import is_for_evaluation, is_plain, says_a_split, split_of
from dschat.errors import UserError

DEPTH = 3
"""Levels of folders below the one given in which files are looked for."""
ABOUT = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
"""Files that `datasets` and the hub write beside the data."""


@dataclass(frozen=True)
class Folder:
    """The files of each split, and the names of what is not read."""

    splits: dict[str, list[Path]]
    unused: tuple[str, ...] = ()


def is_pattern(name: str) -> bool:
    """Whether the name is a pattern of paths, such as shards/*.jsonl."""
    return glob.has_magic(name)


def read_folder(path: Path, entry: Entry) -> Folder:
    """The splits of a folder: files train.jsonl and test.jsonl, folders train/ and test/, numbered shards.

    Raises `UserError` where there are no files, or several configurations.
    """
    files = [file for file in _sorted(path.iterdir()) if _is_data(file)]
    below = {folder: found for folder in _folders(path) if (found := list(_files_below(folder, DEPTH)))}
    # Beside files, a folder such as eval_results is none of a split.
    are_splits = [folder for folder in below if (is_plain if files else says_a_split)(folder.name)]
    if not files and not are_splits:
        if not below:
            raise UserError(f"{entry}: the folder holds no data ({KNOWN_FILES}); name another.")
        if len(below) > 1 and len({split_of(folder.name) for folder in below}) == 1:
            are_splits = list(below)  # numbered folders of shards
        elif len(below) > 1:
            names = [folder.name for folder in below]
            raise UserError(
                f"{entry}: the folder holds several configurations: {', '.join(names)}. Write "
                f"{entry.choices('config', names)}."
            )
        else:
            return read_folder(next(iter(below)), entry)
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(split_of(stem_of(file.name)), []).append(file)
    for folder in are_splits:
        name = split_of(folder.name)
        if any(file.parent == path for file in splits.get(name, [])):
            raise UserError(
                f"{entry}: {folder.name} is the name of a file and of a folder there; name the one that is "
                "meant, or move the other away."
            )
        splits.setdefault(name, []).extend(below[folder])
    for found in splits.values():
        _check_forms(found, entry)
    return Folder(splits, tuple(f"{folder.name}/" for folder in below if folder not in are_splits))


def configuration(path: Path, entry: Entry) -> Path:
    """The folder of the configuration that the entry names. Raises `UserError` where there is none."""
    assert entry.config is not None
    places = [path / entry.config, path / "data" / entry.config]
    for place in places:
        if place.is_dir():
            return place
    names = [folder.name for folder in _folders(path)]
    found = f"found: {', '.join(names)}" if names else "it has no folders"
    remedy = f"write {entry.choices('config', names)}" if names else "leave config= out"
    raise UserError(f"{entry}: the folder has no configuration {entry.config} ({found}); {remedy}.")


def read_pattern(entry: Entry) -> Folder:
    """The files that a pattern matches: those whose names say test or the like to evaluate on, all others to
    train on. Raises `UserError` where none matches."""
    found = glob.glob(str(user_path(entry.name)), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute
    matches = [Path(name) for name in found]
    files = [file for file in _sorted(matches) if _is_data(file)]
    if not files:
        what = "matches no file" if not matches else f"matches {len(matches)} names, none a file that is read"
        raise UserError(
            f"{entry}: the pattern {what}, seen from {Path.cwd()}; correct it ({KNOWN_FILES} are read)."
        )
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(split_of(stem_of(file.name)), []).append(file)
    if entry.split is None:
        evaluation = [name for name in splits if is_for_evaluation(name)]
        held_out = [file for name in evaluation for file in splits[name]]
        training = [file for file in files if file not in held_out]
        splits = {"train": training, "test": held_out} if training and held_out else {"train": files}
    return Folder(splits)


def _is_data(file: Path) -> bool:
    return (
        is_data_file(file.name)
        and not file.name.startswith((".", "_"))
        and file.name not in ABOUT
        and not file.is_dir()
    )


def _folders(path: Path) -> list[Path]:
    return [folder for folder in _sorted(path.iterdir()) if folder.is_dir() and folder.name[0] not in "._"]


def _files_below(folder: Path, depth: int) -> Iterable[Path]:
    for path in _sorted(folder.iterdir()):
        if _is_data(path):
            yield path
        elif depth > 1 and path.is_dir() and path.name[0] not in "._":
            yield from _files_below(path, depth - 1)


def _sorted(paths: Iterable[Path]) -> list[Path]:
    """By name, numbers by value: 2 comes before 10."""

    def by_numbers(path: Path) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", os.fspath(path))
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]

    return sorted(paths, key=by_numbers)


def _check_forms(files: list[Path], entry: Entry) -> None:
    """Raise `UserError` where a file seems to be there in two forms, train.jsonl and train.parquet."""
    seen: dict[Path, Path] = {}
    for file in files:
        other = seen.setdefault(file.parent / stem_of(file.name), file)
        if other is not file:
            raise UserError(
                f"{entry}: {other.name} and {file.name} seem to be one file in two forms, and would be read "
                "twice. Give the path of one of them."
            )
