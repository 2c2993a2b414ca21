"""Atomic folders, complete or absent: written elsewhere, flushed to disk, moved and then marked."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dschat.fingerprint import files_fingerprint, fingerprint

COMPLETE = "complete.json"
"""The mark of a complete folder, written last: size and checksum (xxh3_128) of each of its other files."""

Files = dict[str, tuple[int, str]]
"""Size in bytes and checksum of each file, by its path in the folder."""


@contextmanager
def private_files() -> Iterator[None]:
    """Files and folders made inside the block can be read by their owner alone."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def write_json(path: Path, value: Any) -> None:
    """Replace the file `path` by `value` as JSON, in one step that survives a power cut."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until the bytes of a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def names_of_files(folder: Path) -> list[str]:
    """The paths of all files below `folder` except its mark, sorted."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(name for path in files if (name := str(path.relative_to(folder))) != COMPLETE)


def flushed(folder: Path, names: Iterable[str]) -> Files:
    """Sizes and checksums of the files `names` below `folder`, once they are on the disk.

    One after the other: threads that are made anew for every checkpoint leave the C library's heap larger,
    5 % of resident memory after 300 checkpoints of a tiny model. Each rank has its own part of the files.
    """
    found = {}
    for name in names:
        flush(folder / name)
        found[name] = measured(folder / name)
    return found


def put_in_place(temporary: Path, target: Path, files: Files, **facts: Any) -> None:
    """Move the finished folder `temporary` to `target` and mark it complete, then delete an older `target`.

    `facts` are JSON values to keep in the mark.
    """
    for folder in [path for path in temporary.rglob("*") if path.is_dir()]:
        flush(folder)
    flush(temporary)
    replaced = target.with_name(f".replaced-{target.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.replace(replaced)
    temporary.replace(target)
    flush(target.parent)
    mark_complete(target, files, **facts)
    shutil.rmtree(replaced, ignore_errors=True)


def mark_complete(folder: Path, files: Files, **facts: Any) -> None:
    """Write the mark of a folder whose files are on the disk, with `facts`, which are JSON values."""
    facts = {**facts, "files": files}
    write_json(folder / COMPLETE, {**facts, "checksum": fingerprint(facts)})


def facts_of(folder: Path) -> dict[str, Any] | None:
    """The content of the mark of `folder`; None where there is no mark or a damaged one."""
    try:
        facts = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        return facts if facts.pop("checksum") == fingerprint(facts) else None
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None


def damage(folder: Path) -> str | None:
    """The damage of `folder` in words; None for one that is complete and intact. Reads every byte."""
    facts = facts_of(folder)
    if facts is None:
        return f"it was never finished, or its {COMPLETE} is corrupted"
    names = list(facts["files"])
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: measured(folder / name), names)
        for name, (size, checksum) in zip(names, found, strict=True):
            promised_size, promised = facts["files"][name]
            if size != promised_size:
                return f"{name} has {size} bytes instead of {promised_size}"
            if checksum != promised:
                return f"{name} is corrupted: its checksum is not the one that was saved"
    return None


def measured(path: Path) -> tuple[int, str]:
    """Size in bytes and checksum (xxh3_128) of the file `path`."""
    return path.stat().st_size, files_fingerprint([path])
