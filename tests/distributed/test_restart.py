"""Programs that start again in place."""

import json
import sys

import pytest
import torch.distributed as dist

from dschat.distributed import restart
from dschat.distributed.process_wide import process_wide
from dschat.distributed.restart import Orders


@pytest.fixture
def started(monkeypatch) -> list:
    """What programs were started with, by this process as one rank of one with a store."""
    started = []
    monkeypatch.setattr(process_wide(Orders), "store", dist.HashStore())
    monkeypatch.setattr(restart, "_start_again", lambda *how: started.append(how))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    return started


@pytest.mark.parametrize("start", [["-u", "main.py"], ["-m", "package.main"]])
def test_the_command_keeps_how_python_was_started(start):
    arguments = ["--local_rank=1", "--data_path", "a", "b", "--rows=4", "--more", "1"]
    command = restart.command(["python3", *start, *arguments], arguments, {"rows": 2, "more": 2})
    kept = ["--local_rank=1", "--data_path", "a", "b", "--more", "1"]
    assert command == [sys.executable, *start, *kept, "--rows=2", "--more=2"]


def test_the_first_of_two_orders_counts(started):
    process_wide(Orders).store.set(restart.ORDER, json.dumps({"flags": {"rows": 1}, "message": "first"}))
    restart.order({"rows": 2}, "second")
    (how,) = started
    assert how[:2] == ({"rows": 1}, "first")
    assert 0 < how[2] < 2**16  # a port


def test_nothing_starts_again_without_an_order(started):
    restart.obey()
    assert started == []


def test_a_rank_that_does_not_answer_lets_the_others_go_on(started, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(restart, "WAIT", 0.05)
    restart.order({"rows": 2}, "message")
    assert started == []


def test_without_a_process_group_there_is_nobody_to_order(monkeypatch):
    monkeypatch.setattr(process_wide(Orders), "store", None)
    restart.order({}, "message")
    restart.obey()
    restart.forget()


def test_the_store_is_let_go_of_once_all_ranks_are_leaving(started, monkeypatch):
    store = process_wide(Orders).store
    restart.forget()
    assert process_wide(Orders).store is None
    assert [store.add(key, 0) for key in (restart.LEAVING, restart.LEFT)] == [1, 1]
