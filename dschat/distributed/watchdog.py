"""Watch over the other ranks on this machine, so that none waits for ever for one that is gone."""

import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING
from zlib import crc32

import psutil

from dschat.console import messages
from dschat.distributed.host_watch import HostWatch
from dschat.distributed.launcher import end_torchrun
from dschat.distributed.process_wide import process_wide

if TYPE_CHECKING:  # torch takes seconds to import, and --help is to answer at once
    import torch.distributed as dist

INTERVAL = 1.0
"""Seconds between looks."""

NUM_LOOKS = 5
"""Looks within one interval after an error: a connection may break before its process counts as ended."""

JOIN = 10.0
"""Seconds that a look may still take when the watch ends: it may wait for the store of the process group."""

LOST_CONNECTION = re.compile(r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|remote process exited")
"""What gloo, NCCL and the store say where a rank of another host is gone."""

GRACE = 20.0
"""Seconds that this rank has to notice by itself, in a collective that fails, and to end in good order."""


def machine_number() -> int:
    """The same for the processes of one machine and one container, and hardly ever for those of two."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return crc32((gethostname() + (boot.read_text() if boot.is_file() else "")).encode())


def is_gone(pid: int) -> bool:
    """Whether a process has ended, though its parent may not have taken note yet."""
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


class RankWatchdog:
    """Ends this process soon after a rank of the same machine has ended; `peers` are their pids by rank.

    Collectives of gloo fail at once where a rank is gone. Others wait, and the launcher's request to end is
    not heard in them: a thread looks, says who is missing, and leaves.
    """

    def __init__(
        self, peers: dict[int, int], *, rank: int, each_time: Callable[[], None] = lambda: None
    ) -> None:
        """`each_time` is called before each look."""
        self._peers, self._rank, self.each_time = peers, rank, each_time
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, name="peer watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more: from here on ranks may end. The thread has ended then, or `JOIN` has passed."""
        self._stopped.set()
        self._thread.join(JOIN)

    def message(self) -> str | None:
        """What to say of the ranks that are gone, None where all are there."""
        gone = [rank for rank, pid in self._peers.items() if is_gone(pid)]
        if not gone:
            return None
        names = ", ".join(f"rank {rank} (process {self._peers[rank]})" for rank in gone)
        return (
            f"{names} ended before this rank, which cannot go on alone. What went wrong there stands above; "
            "where nothing does, it was killed, most often because memory ran out (dmesg tells). The run "
            "goes on from its last checkpoint with --resume_from_checkpoint latest."
        )

    @property
    def _reports(self) -> bool:
        """Whether this is the lowest rank left: one message is enough."""
        return all(rank > self._rank or is_gone(pid) for rank, pid in self._peers.items())

    def report(self, message: str) -> None:
        """Show the message, on one of the ranks that are left."""
        if self._reports:
            messages.to_stderr(f"error: {message}")

    def _look(self) -> None:
        while not self._stopped.wait(INTERVAL):
            self.each_time()
            message = self.message()
            if message is None:
                continue
            if not self._stopped.wait(GRACE):
                self.report(self.message() or message)  # more ranks may have ended
                os._exit(1)  # the main thread hangs in a collective and cannot be woken
            return


@dataclass
class WatchedRanks:
    """The watch over the other ranks of the process group, of which a process has one at most."""

    watchdog: RankWatchdog | None = None
    hosts: HostWatch | None = None
    """On the first rank of a host, where there are several."""
    has_other_hosts: bool = False


def start_watching(
    pids: Sequence[int], machines: Sequence[int], *, rank: int, each_time: Callable[[], None] = lambda: None
) -> None:
    """Watch the ranks whose machine is this rank's, unless they are watched; both lists are by rank.

    `each_time` is as in `RankWatchdog`.
    """
    watched = process_wide(WatchedRanks)
    if watched.watchdog is not None:
        return
    by_rank = enumerate(zip(pids, machines, strict=True))
    peers = {r: pid for r, (pid, machine) in by_rank if r != rank and machine == machines[rank]}
    watched.watchdog = RankWatchdog(peers, rank=rank, each_time=each_time)


def start_watching_hosts(
    store: "dist.Store", machines: Sequence[int], names: Sequence[str], *, rank: int, limit: float
) -> None:
    """Watch the other hosts, on the first rank of each; `machines` and `names` of hosts are by rank.

    `store` and `limit` are as in `HostWatch`; 0 watches nothing.
    """
    hosts = list(dict.fromkeys(machines))
    process_wide(WatchedRanks).has_other_hosts = len(hosts) > 1
    is_first = machines.index(machines[rank]) == rank
    if len(hosts) == 1 or not is_first or limit == 0:
        return
    firsts = [machines.index(host) for host in hosts]
    described = [f"{names[first]} (rank {first})" for first in firsts]
    process_wide(WatchedRanks).hosts = HostWatch(store, described, firsts.index(rank), limit)


def stop_watching() -> bool:
    """From here on ranks may end. False where none was watched."""
    watched = process_wide(WatchedRanks)
    watchdog, watched.watchdog = watched.watchdog, None
    hosts, watched.hosts = watched.hosts, None
    if hosts is not None:
        hosts.stop()
    if watchdog is None:
        return False
    watchdog.stop()
    return True


def report_lost_peers(error: Exception) -> bool:
    """Say which ranks of this machine are gone, or that one of another host is; False where none is."""
    watched = process_wide(WatchedRanks)
    watchdog = watched.watchdog
    if watchdog is None:
        return False
    for _ in range(NUM_LOOKS):
        watchdog.each_time()
        message = watchdog.message()
        if message is not None:
            watchdog.report(message)
            return True
        time.sleep(INTERVAL / NUM_LOOKS)
    if watched.has_other_hosts and LOST_CONNECTION.search(str(error)):
        messages.to_stderr(
            f"error: a connection to a rank on another host broke ({error}): that rank has ended, and its "
            "own console tells why. The run goes on from its last checkpoint with --resume_from_checkpoint "
            "latest."
        )
        end_torchrun()
        return True
    return False
