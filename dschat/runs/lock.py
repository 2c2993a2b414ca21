"""Which run writes into an output folder: a lock that its rank 0 holds until its process ends."""

import contextlib
import fcntl
import json
import os
import socket
import time
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from dschat.console import messages
from dschat.distributed.launcher import is_launched
from dschat.distributed.process_wide import process_wide
from dschat.distributed.watchdog import is_gone, machine_number
from dschat.errors import UserError

LOCK = ".run.lock"
"""Held by rank 0 of the run that writes into the folder; it says who that is."""

PATIENCE = 60.0
"""Seconds that a run waits for the end of one that is ending: torchrun kills after 30."""

UNKNOWN_PATIENCE = 1.0
"""Seconds that a run waits until the holder has written who it is."""


@dataclass(frozen=True)
class Holder:
    """The run that holds the lock, or the last that did."""

    pid: int
    host: str
    machine: int
    since: str
    launcher: int | None
    """The process that started the ranks, where torchrun or the deepspeed launcher did."""
    launch: str | None
    """The same for all attempts of one torchrun."""
    has_begun: bool = False
    """Whether this launch has made the folder its own: what was there before is cleared."""
    is_stopping: bool = False
    """Whether it was asked to stop."""

    @property
    def is_ending(self) -> bool:
        """Whether it may be gone soon: it was asked to stop, or nobody looks after it any more."""
        if self.is_stopping:
            return True
        processes = [self.pid, *([self.launcher] if self.launcher else [])]
        return self.machine == machine_number() and any(map(is_gone, processes))


@dataclass
class _Claim:
    descriptor: int
    holder: Holder


class HeldLocks(dict[Path, _Claim]):
    """The locks of this process by folder: the system counts a record lock to the process that holds it."""


def claim(folder: Path) -> None:
    """Keep other runs out of the folder until this process ends.

    Raises `UserError` at once where another run holds it; one that is ending is waited for.
    """
    # A record lock: unlike that of flock, it is not shared with forked processes, which may outlive this one.
    place, held = folder.resolve(), process_wide(HeldLocks)
    if place in held:  # opening it once more, and closing that, would give the lock back
        return
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        _wait_for_lock(folder, descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    before = _read(descriptor)
    holder = _this_run()
    if before is not None and holder.launch is not None and before.launch == holder.launch:
        holder = replace(holder, has_begun=before.has_begun)
    held[place] = _Claim(descriptor, holder)
    _write(held[place])


def note_begun(folder: Path) -> None:
    """The run has begun to write into the folder, if it has claimed it."""
    held = process_wide(HeldLocks).get(folder.resolve())
    if held is not None:
        held.holder = replace(held.holder, has_begun=True)
        _write(held)


def note_stopping() -> None:
    """The run was asked to stop: another may wait for its folder. Safe in a signal handler."""
    for held in process_wide(HeldLocks).values():
        held.holder = replace(held.holder, is_stopping=True)
        _write(held)


def has_begun_before(folder: Path) -> bool:
    """Whether an earlier attempt of this launch, which torchrun has started again, began in the folder."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0:
        return False
    held = process_wide(HeldLocks).get(folder.resolve())
    holder = held.holder if held else _read_file(folder / LOCK)
    return holder is not None and holder.has_begun and holder.launch == _this_launch()


def _wait_for_lock(folder: Path, descriptor: int) -> None:
    start, has_noted = time.monotonic(), False
    while not _is_mine(descriptor):
        holder, waited = _read(descriptor), time.monotonic() - start
        if waited > (UNKNOWN_PATIENCE if holder is None else PATIENCE if holder.is_ending else -1):
            raise UserError(
                f"--output_dir {folder}: another run is writing into it{_described(holder)}; wait for "
                "its end or stop it first, or name another folder."
            )
        if holder is not None and not has_noted:
            has_noted = True
            messages.note(f"another run{_described(holder)} is ending in {folder}; waiting for that.")
        time.sleep(0.1)


def _described(holder: Holder | None) -> str:
    return f" (process {holder.pid} on {holder.host}, since {holder.since})" if holder else ""


def _is_mine(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _this_run() -> Holder:
    return Holder(
        pid=os.getpid(),
        host=socket.gethostname(),
        machine=machine_number(),
        since=datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        launcher=os.getppid() if is_launched() else None,
        launch=_this_launch(),
    )


def _this_launch() -> str | None:
    """A name of the launch that is the same when torchrun starts the ranks again; None without torchrun."""
    if "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        return None
    given = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return f"{machine_number()}:{os.getppid()}" if given == "none" else given


def _write(held: _Claim) -> None:
    text = json.dumps(asdict(held.holder)).encode()
    with contextlib.suppress(OSError):  # a full disk: the lock itself needs no room
        os.ftruncate(held.descriptor, 0)
        os.pwrite(held.descriptor, text, 0)


def _read(descriptor: int) -> Holder | None:
    """Who the file says holds it; None where it does not say, or is being written."""
    try:
        return Holder(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _read_file(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
