"""The files of an exported model, which a record names before they are written.

No other file in the folder is ever removed or replaced.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dschat.console import messages
from dschat.runs.atomic_folder import Files, flush, flushed, measured, names_of_files, write_json

RECORD = ".export.json"
"""Size and checksum of every file of the export beside it, by name."""

TEMPORARY = ".export-"
"""The beginning of the name of the folder into which an export is written first."""

ADAPTER_FOLDER = "adapter"
"""The subfolder of LoRA adapters in PEFT's format. They are merged into the weights beside it."""

WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*", "adapter_config.json", "adapter_model*")
"""Patterns of the files that transformers would load from a folder, whoever wrote them."""

EXPORTED = (
    *WEIGHTS,
    *("config.json", "generation_config.json", "manifest.json", "README.md", f"{ADAPTER_FOLDER}/*"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("spiece.model", "sentencepiece*", "chat_template*"),
)
"""Patterns of the files that an export may have."""


def recorded(folder: Path) -> Files:
    """The files of the export in `folder` by its record; none without one.

    An export of a version that kept no record is known by its manifest.
    """
    record = _read_json(folder / RECORD)
    if isinstance(record, dict) and isinstance(record.get("files"), dict):
        return record["files"]
    manifest = _read_json(folder / "manifest.json")
    if isinstance(manifest, dict) and "golden_inputs" in manifest:
        return {name: measured(folder / name) for name in _exported_names(folder)}
    return {}


def foreign_files(folder: Path) -> Iterator[str]:
    """Files that an export would replace, or that would be loaded with it, and that no run wrote like that.

    Each comes with the reason, such as "config.json (no run wrote it)". Reads every byte of recorded files.
    """
    ours = recorded(folder)
    for name in _exported_names(folder):
        path = folder / name
        if path.is_symlink() or path.parent.is_symlink():
            yield f"{name} (a symbolic link)"
        elif name not in ours:
            yield f"{name} (no run wrote it)"
        elif list(measured(path)) != list(ours[name]):
            yield f"{name} (it was changed after a run had written it)"


def remove_export(folder: Path) -> None:
    """Remove the export in `folder`, and the folder where it held nothing else."""
    if folder.is_symlink() or not folder.is_dir():
        return
    _remove_left_behind(folder)
    ours = recorded(folder)
    _remove_files(folder, ours)
    (folder / RECORD).unlink(missing_ok=True)
    if ours:
        with suppress(OSError):  # where something else is in it
            folder.rmdir()


@contextmanager
def replacing_export(output_dir: Path) -> Iterator[Path]:
    """A new folder to fill with a model, which replaces the export in `output_dir` after the block.

    Where the block raises, the older export stays.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(output_dir)
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=output_dir))
    try:
        yield temporary
        _move_into_place(temporary, output_dir)
    finally:
        shutil.rmtree(temporary)


def link_export(source: Path, folder: Path) -> None:
    """Link the files of the export in `source` into the new `folder`, or copy them where links fail."""
    for name in recorded(source):
        place = folder / name
        place.parent.mkdir(exist_ok=True)
        try:
            os.link(source / name, place)
        except OSError:
            shutil.copy2(source / name, place)


def _move_into_place(temporary: Path, output_dir: Path) -> None:
    """Replace the export in `output_dir` by the files in `temporary`.

    At every moment the record names all files that runs wrote. config.json is removed first and comes last,
    so that a folder with one is complete.
    """
    new = flushed(temporary, names_of_files(temporary))
    old = recorded(output_dir)
    _set_aside(output_dir, [name for name in _present(output_dir, new) if name not in old])
    write_json(output_dir / RECORD, {"files": old | new})
    _remove_files(output_dir, old)
    for name in sorted(new, key=lambda name: name == "config.json"):
        (output_dir / name).parent.mkdir(exist_ok=True)
        (temporary / name).replace(output_dir / name)
    for folder in {(output_dir / name).parent for name in new}:
        flush(folder)
    write_json(output_dir / RECORD, {"files": new})


def _remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove the files `names` below `folder`, config.json first, and subfolders that are empty then."""
    for name in sorted(names, key=lambda name: name != "config.json"):
        if not (folder / name).parent.is_symlink():
            (folder / name).unlink(missing_ok=True)
    for below in {(folder / name).parent for name in names} - {folder}:
        with suppress(OSError):  # where something else is in it, or it is gone
            below.rmdir()


def _present(folder: Path, new: Iterable[str]) -> list[str]:
    """The files in `folder` that have the names `new`, or that would be loaded together with those."""
    loaded = [name for name in _exported_names(folder) if any(fnmatch(name, weight) for weight in WEIGHTS)]
    return sorted({*loaded, *(name for name in new if os.path.lexists(folder / name))})


def _set_aside(folder: Path, names: Iterable[str]) -> None:
    """Rename files that someone else put into `folder` while the run went on."""
    for name in names:
        kept = (folder / name).with_name(f"set-aside-{Path(name).name}")
        while os.path.lexists(kept):
            kept = kept.with_name(f"set-aside-{kept.name}")
        (folder / name).rename(kept)
        messages.note(f"{folder / name} is no file of this run; it is kept as {kept.name}.", every_rank=True)


def _remove_left_behind(folder: Path) -> None:
    """Remove the unfinished exports of killed runs."""
    for left_behind in folder.glob(f"{TEMPORARY}????????"):
        if left_behind.is_dir() and not left_behind.is_symlink():
            shutil.rmtree(left_behind)


def _exported_names(folder: Path) -> list[str]:
    """The files in `folder` with names that an export may have."""
    places = [*folder.glob("*"), *(folder / ADAPTER_FOLDER).glob("*")]
    names = [str(path.relative_to(folder)) for path in places if path.is_symlink() or path.is_file()]
    return sorted(name for name in names if any(fnmatch(name, pattern) for pattern in EXPORTED))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
