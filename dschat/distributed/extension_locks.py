"""Locks of torch's extension builds that a killed process has left behind.

DeepSpeed compiles and loads its operators through torch, which makes a file called lock for that time, and
waits for as long as another's is there (`torch.utils.file_baton`). A process that is killed then leaves it,
and every later run would wait for ever.
"""

import os
import time
from pathlib import Path

from torch.utils.cpp_extension import _get_build_directory

from dschat.console import messages

OPEN_FILES = Path("/proc/self/fd")

QUIET = 2.0
"""Seconds for which nobody may have a lock open that was left behind: an owner closes it, then deletes it."""

NOTE_AFTER = 5.0
"""Seconds of waiting that are worth a line."""

ELSEWHERE = 900.0
"""Seconds that a build on another machine, which shares this folder, may take."""


def clear_build_locks(*, on_one_machine: bool) -> list[Path]:
    """Delete the locks that no process holds; wait for those that one does. Returns what was deleted.

    Who holds a file is known on Linux alone; elsewhere nothing is deleted.
    """
    if not OPEN_FILES.is_dir():
        return []
    locks = _build_folder().glob("*/lock")
    return [lock for lock in locks if _is_left_behind(lock, 0 if on_one_machine else ELSEWHERE)]


def _build_folder() -> Path:
    """Where torch builds extensions for this Python and this kind of device."""
    # The folder of an operator is made where it is not there yet, as by torch itself.
    return Path(_get_build_directory("cpu_adam", verbose=False)).parent


def _is_left_behind(lock: Path, youngest: float) -> bool:
    """Wait until the lock is gone, or deleted here as nobody holds it and it is `youngest` seconds old."""
    start = unheld_since = time.monotonic()
    has_noted = False
    while True:
        try:
            age = time.time() - lock.stat().st_mtime
            if is_open(lock):
                unheld_since = time.monotonic()
            elif time.monotonic() - unheld_since > QUIET and age > youngest:
                lock.unlink()
                return True
        except FileNotFoundError:
            return False
        if time.monotonic() - start > NOTE_AFTER and not has_noted:
            has_noted = True
            messages.note(f"waiting for another process that compiles {lock.parent.name} ({lock}).")
        time.sleep(0.1)


def is_open(path: Path) -> bool:
    """Whether a process of this machine, as far as this user may see, has the file open."""
    target = str(path.resolve())
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == target:  # noqa: PTH115, as Path.readlink is slower by far
                return True
        except OSError:  # ended, closed, or another user's
            continue
    return False
