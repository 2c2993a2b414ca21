"""A folder of results, each under a fingerprint of all that shaped it: built once, read by every rank."""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from dschat.console.streams import heard
from dschat.data.files import user_path
from dschat.data.user_cache import user_cache
from dschat.errors import UserError

MANIFEST = "files.json"
"""Written last: the size of each file of an entry."""


def cache_folder(data_output_path: str | None) -> Path:
    """The folder of results, made where it is missing, for its owner's eyes only.

    Default: dschat below `user_cache()`. Raises `UserError` where it is not writable.
    """
    folder = user_path(data_output_path) if data_output_path else user_cache() / "dschat"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        problem = f"--data_output_path {folder} cannot be written ({error.strerror})"
        raise UserError(f"{problem}; name a folder you may write to.") from error
    return folder.absolute()


def cached(root: Path, key: str, build: Callable[[Path], None]) -> Path:
    """The folder root/key, filled by `build(folder)` where it is missing.

    Any number of processes may ask at once: one builds, the others wait and find it. What is there is whole:
    it is built beside its place and moved there at the end; a build that fails leaves nothing behind. Where
    a file is missing or cut short all the same, it is built again.
    """
    target = root / key
    if _is_whole(target):
        return target
    with FileLock(root / f"{key}.lock"):
        if _is_whole(target):
            return target
        shutil.rmtree(target, ignore_errors=True)
        for left_behind in root.glob(f"{key}.unfinished-*"):  # by a process that was killed
            shutil.rmtree(left_behind, ignore_errors=True)
        unfinished = Path(tempfile.mkdtemp(dir=root, prefix=f"{key}.unfinished-"))
        try:
            with heard(sys.stderr):  # the bars of whichever rank builds
                build(unfinished)
            (unfinished / MANIFEST).write_text(json.dumps(_sizes(unfinished)))
            unfinished.replace(target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return target


def lookup(root: Path, key: str) -> Path | None:
    """The folder root/key where it is there and whole."""
    return root / key if _is_whole(root / key) else None


def _is_whole(folder: Path) -> bool:
    """Whether every file that was built is there in its size; others may have come since."""
    try:
        built = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return built.items() <= _sizes(folder).items()


def _sizes(folder: Path) -> dict[str, int]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}
