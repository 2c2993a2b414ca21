"""Watch over the other hosts of a run: a host that is lost, or a cut link, would leave collectives waiting.

The first rank of each host counts itself up in the store of the process group, which rank 0's host holds, and
looks whether the others count on. A rank that reads nothing new for the limit ends its process; the launchers
then end the others of its host.
"""

import os
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dschat.console import messages
from dschat.distributed.launcher import GRACE, end_torchrun

if TYPE_CHECKING:  # torch takes seconds to import, and --help is to answer at once
    import torch.distributed as dist

INTERVAL = 1.0
"""Seconds between beats."""


class HostWatch:
    """Ends this process where another host has not answered for `limit` seconds."""

    def __init__(self, store: "dist.Store", hosts: Sequence[str], own: int, limit: float) -> None:
        """`hosts` are described for messages, that of rank 0 first; `own` is this host's place among them.

        `store` is a connection that nobody else uses: while a link is cut a call of it may never return.
        """
        self._store, self._hosts, self._own, self._limit = store, hosts, own, limit
        self._heard = dict.fromkeys(range(len(hosts)), time.monotonic())
        self._asked_since: float | None = None
        self._stopped = threading.Event()
        for work in (self._beat, self._look):
            threading.Thread(target=work, name="host watch", daemon=True).start()

    def stop(self) -> None:
        """Watch no more: from here on hosts may end."""
        self._stopped.set()

    def lost(self) -> list[int]:
        """The hosts that have not answered in time; that of the store alone where it does not answer."""
        now = time.monotonic()
        if self._own and now - (self._asked_since or now) > self._limit:
            return [0]
        return [
            host for host, heard in self._heard.items() if now - heard > self._limit and host != self._own
        ]

    def message(self, lost: Sequence[int]) -> str:
        """What to say of hosts that are lost."""
        names = ", ".join(self._hosts[host] for host in lost)
        return (
            f"no answer from {names} for {self._limit:g} s (--host_timeout), so this host, "
            f"{self._hosts[self._own]}, cannot go on: the link is cut, or that host is down. The run goes on "
            "from its last checkpoint with --resume_from_checkpoint latest, also on the hosts that are left."
        )

    def _beat(self) -> None:
        """Count this host up, and note which others have counted on."""
        counts: dict[int, int] = {}
        while not self._stopped.wait(INTERVAL):
            self._asked_since = self._asked_since or time.monotonic()
            try:
                for host in self._heard:
                    count = self._store.add(f"host_watch/{host}", int(host == self._own))
                    if count != counts.get(host):
                        counts[host], self._heard[host] = count, time.monotonic()
            except RuntimeError:  # the store is gone, or cannot be reached: it has not answered since
                continue
            self._asked_since = None

    def _look(self) -> None:
        """Look at the notes alone, as a call of the store may hang."""
        while not self._stopped.wait(INTERVAL):
            lost = self.lost()
            if lost:
                messages.to_stderr(f"error: {self.message(lost)}")
                if end_torchrun():
                    messages.to_stderr(f"torchrun on this host is killed if it has not ended in {GRACE:g} s.")
                os._exit(1)  # the main thread hangs in a collective and cannot be woken
