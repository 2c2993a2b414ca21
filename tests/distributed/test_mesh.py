"""The place of a process among others."""

import pytest

from dschat.distributed.mesh import Axis, is_main_process, mesh

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_a_process_is_alone():
    assert mesh().world == mesh().data == mesh().machine == Axis(rank=0, size=1)
    assert is_main_process()


def test_on_two_machines_with_two_processes_each(monkeypatch):
    for name, value in zip(VARIABLES, ("3", "4", "1", "2"), strict=True):
        monkeypatch.setenv(name, value)
    place = mesh()
    assert (place.world, place.data) == (Axis(3, 4), Axis(3, 4))
    assert place.machine == Axis(1, 2)
    assert not place.is_main_process
    # Nothing but data is shared out today.
    assert place.tensor == place.sequence == place.pipeline == Axis(0, 1)


def test_ranks_without_local_numbers_are_on_one_machine(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert mesh().machine == Axis(1, 2)
