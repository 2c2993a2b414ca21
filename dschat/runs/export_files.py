"""The files of an exported model: which files of a folder are ours, by a record that is written before them.

Nothing else is ever removed or replaced.
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
"""What the folder of an export that is being written begins with."""

ADAPTER_FOLDER = "adapter"
"""Where an export keeps LoRA's adapters, in PEFT's format; the weights beside it have them merged in."""

WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*", "adapter_config.json", "adapter_model*")
"""What transformers would load from the folder, whoever wrote it."""

EXPORTED = (
    *WEIGHTS,
    *("config.json", "generation_config.json", "manifest.json", "README.md", f"{ADAPTER_FOLDER}/*"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("spiece.model", "sentencepiece*", "chat_template*"),
)
"""The names that an export may have."""


def recorded(folder: Path) -> Files:
    """The files of the export in `folder`; none where no record says so.

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
    """Files that an export would replace, or that would be loaded with it, and are not as ours were written.

    Each with the reason, such as "config.json (no run wrote it)". Reads what is recorded.
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
    """A folder to fill with a model, which then takes the place of an older one in `output_dir`.

    Where the block fails, the older one stays.
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
    """Let the new `folder` have the files of the export in `source`, as links where those can be made."""
    for name in recorded(source):
        place = folder / name
        place.parent.mkdir(exist_ok=True)
        try:
            os.link(source / name, place)
        except OSError:
            shutil.copy2(source / name, place)


def _move_into_place(temporary: Path, output_dir: Path) -> None:
    """Replace the export in `output_dir`.

    At every moment the record names what is ours; config.json goes first and comes last, so that a folder
    which has one is complete.
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
    """Remove these files, config.json first, and the folders below `folder` that are empty then."""
    for name in sorted(names, key=lambda name: name != "config.json"):
        if not (folder / name).parent.is_symlink():
            (folder / name).unlink(missing_ok=True)
    for below in {(folder / name).parent for name in names} - {folder}:
        with suppress(OSError):  # where something else is in it, or it is gone
            below.rmdir()


def _present(folder: Path, new: Iterable[str]) -> list[str]:
    """What stands in the way of files with these names, or would be loaded with them."""
    loaded = [name for name in _exported_names(folder) if any(fnmatch(name, weight) for weight in WEIGHTS)]
    return sorted({*loaded, *(name for name in new if os.path.lexists(folder / name))})


def _set_aside(folder: Path, names: Iterable[str]) -> None:
    """Give files that came to lie there while the run went on another name."""
    for name in names:
        kept = (folder / name).with_name(f"set-aside-{Path(name).name}")
        while os.path.lexists(kept):
            kept = kept.with_name(f"set-aside-{kept.name}")
        (folder / name).rename(kept)
        messages.note(f"{folder / name} is no file of this run; it is kept as {kept.name}.", every_rank=True)


def _remove_left_behind(folder: Path) -> None:
    """Remove what a run that was killed had not finished."""
    for left_behind in folder.glob(f"{TEMPORARY}????????"):
        if left_behind.is_dir() and not left_behind.is_symlink():
            shutil.rmtree(left_behind)


def _exported_names(folder: Path) -> list[str]:
    """The files in the folder that are called like those of an export."""
    places = [*folder.glob("*"), *(folder / ADAPTER_FOLDER).glob("*")]
    names = [str(path.relative_to(folder)) for path in places if path.is_symlink() or path.is_file()]
    return sorted(name for name in names if any(fnmatch(name, pattern) for pattern in EXPORTED))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
