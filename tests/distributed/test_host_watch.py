"""A host that does not answer ends the others; tests/steps/test_two_hosts.py cuts a real link."""

import time

import pytest
import torch.distributed as dist

from dschat.distributed import host_watch, watchdog
from dschat.distributed.host_watch import HostWatch
from dschat.distributed.process_wide import process_wide
from dschat.distributed.watchdog import WatchedRanks

HOSTS = ["node-a (rank 0)", "node-b (rank 8)"]


class Ended(BaseException):
    """In the place of the end of the process."""


@pytest.fixture
def ends(monkeypatch) -> list[int]:
    """Exit codes with which the process would have ended."""
    ends: list[int] = []
    monkeypatch.setattr(host_watch, "INTERVAL", 0.01)
    monkeypatch.setattr(host_watch.os, "_exit", ends.append)
    return ends


def wait_for(condition, seconds=10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_hosts_that_count_on_hear_each_other(ends):
    store = dist.HashStore()
    watches = [HostWatch(store, HOSTS, own, 60.0) for own in range(2)]
    wait_for(lambda: min(store.add(f"host_watch/{host}", 0) for host in range(2)) > 5)
    assert [watch.lost() for watch in watches] == [[], []]
    for watch in watches:
        watch.stop()
    assert ends == []


def test_a_host_that_counts_no_more_ends_the_other_which_names_it(ends, capsys):
    watch = HostWatch(dist.HashStore(), HOSTS, 0, 0.2)
    wait_for(lambda: ends)
    watch.stop()
    assert ends[0] == 1
    message = capsys.readouterr().err.splitlines()[0]
    assert message.startswith(
        "error: no answer from node-b (rank 8) for 0.2 s (--host_timeout), so this host, "
    )
    assert "--resume_from_checkpoint latest" in message


@pytest.mark.parametrize("how", ["hangs", "fails"])
def test_where_the_store_does_not_answer_its_host_is_the_lost_one(ends, how):
    class Unreachable:
        def add(self, key: str, amount: int) -> int:
            if how == "fails":
                raise dist.DistNetworkError("Connection reset by peer")
            time.sleep(3)
            return 0

    watch = HostWatch(Unreachable(), HOSTS, 1, 0.2)
    wait_for(lambda: ends)
    watch.stop()
    assert watch.lost() == [0]


def test_the_first_rank_of_each_of_several_hosts_watches(ends):
    started = []
    for machines, limit in (([7, 7, 9, 9], 5.0), ([7, 7], 5.0), ([7, 9], 0.0)):
        for rank in range(len(machines)):
            process_wide(WatchedRanks).hosts = None
            names = [f"node-{machine}" for machine in machines]
            watchdog.start_watching_hosts(dist.HashStore(), machines, names, rank=rank, limit=limit)
            hosts = process_wide(WatchedRanks).hosts
            if hosts is not None:
                started.append((machines, rank))
                hosts.stop()
    process_wide(WatchedRanks).hosts = None
    process_wide(WatchedRanks).has_other_hosts = False
    assert started == [([7, 7, 9, 9], 0), ([7, 7, 9, 9], 2)]
