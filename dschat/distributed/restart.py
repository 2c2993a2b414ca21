"""All ranks start their program again, in place and with other flags: the process stays, its memory does not.

A rank that cannot go on gives the order through the store of the process group, where a thread of every
other rank (`dschat.distributed.watchdog`) finds it, also where the main thread waits in a collective. A
DeepSpeed engine cannot be mended after half a backward pass, and nobody knows what a failed allocation
leaves behind: a new program is both simple and sure. Launchers see the same processes go on.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from dschat.console import messages
from dschat.distributed.process_wide import process_wide

ORDER, PORT, READY = "restart/order", "restart/port", "restart/ready"
LEAVING, LEFT = "leave/leaving", "leave/left"
WAIT = 60.0
"""Seconds that a rank waits for the others to be ready."""


class Orders:
    """Where orders to start again are given and found."""

    def __init__(self) -> None:
        self.store: dist.Store | None = None
        """A connection of its own to the process group's store; None without a process group."""
        self.obeying = threading.Lock()
        """Held by the thread that starts the program again."""


def listen() -> None:
    """Take part in restarts; called on every rank once there is a process group."""
    process_wide(Orders).store = own_connection()


def own_connection() -> dist.Store:
    """A new connection to the process group's store, as another thread may wait in the group's."""
    return _get_default_store().clone()  # type: ignore[attr-defined]


def order(flags: Mapping[str, object], message: str) -> None:
    """Let every rank start again with these flags; returns only where that cannot be done.

    Where two ranks give an order, the first counts. Its message is shown.
    """
    store = process_wide(Orders).store
    if store is None:
        return
    store.compare_set(ORDER, "", json.dumps({"flags": dict(flags), "message": message}))
    obey()


def obey() -> None:
    """Start again if a rank has ordered it: does not return then, unless a rank does not answer."""
    orders = process_wide(Orders)
    store = orders.store
    try:
        if store is None or not store.check([ORDER]):
            return
    except RuntimeError:  # rank 0, which holds the store, is gone
        return
    with orders.obeying:
        given = json.loads(store.get(ORDER))
        port = _agreed_port(store, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        if port is not None:
            _start_again(given["flags"], given["message"], port)


def _agreed_port(store: dist.Store, rank: int, world_size: int) -> int | None:
    """A free port for the new group's store, once every rank knows of the order; None where one does not."""
    if rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            store.set(PORT, str(probe.getsockname()[1]))
    port = int(store.get(PORT))
    store.add(READY, 1)
    return port if _all_are_at(READY, store, world_size) else None


def _all_are_at(key: str, store: dist.Store, world_size: int) -> bool:
    """Wait until every rank has counted itself under the key; False where one has not in time."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        try:
            if store.add(key, 0) >= world_size:
                return True
        except RuntimeError:  # rank 0, which held the store, has seen them all and gone ahead
            return True
        time.sleep(0.02)
    return False


def forget() -> None:
    """Let go of the store, on every rank: once all are here, or one has not come in time.

    The last collective is over on every rank then, and no thread uses the store, which rank 0 may hold.
    """
    orders = process_wide(Orders)
    store, orders.store = orders.store, None
    if store is None:
        return
    world_size = int(os.environ["WORLD_SIZE"])
    with contextlib.suppress(RuntimeError):  # the rank that held the store has ended
        store.add(LEAVING, 1)
        _all_are_at(LEAVING, store, world_size)
        store.add(LEFT, 1)
        if os.environ["RANK"] == "0":  # or the others' last look at the store would fail
            _all_are_at(LEFT, store, world_size)


def _start_again(flags: Mapping[str, object], message: str, port: int) -> None:
    messages.info(message)
    sys.stdout.flush()
    sys.stderr.flush()
    # torchrun's own store still holds the old group's keys: rank 0 makes a new one, as without torchrun.
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False")
    for child in psutil.Process().children(recursive=True):
        child.kill()
    for open_file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the folder itself was open, too
            os.set_inheritable(int(open_file.name), int(open_file.name) <= 2)
    os.execv(sys.executable, command(sys.orig_argv, sys.argv[1:], flags))


def command(original: Sequence[str], arguments: Sequence[str], flags: Mapping[str, object]) -> list[str]:
    """`original`, whose program got `arguments`, with these flags; of a flag given twice the last counts."""
    start = [sys.executable, *original[1 : len(original) - len(arguments)]]
    kept = [a for a in arguments if a.split("=")[0].removeprefix("--") not in flags or "=" not in a]
    return [*start, *kept, *(f"--{name}={value}" for name, value in flags.items())]
