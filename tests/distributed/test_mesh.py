"""The place of a process among others."""

import pytest

from dschat.distributed.mesh import (
    Axis,
    ParallelSizes,
    data_ranks_of,
    is_main_process,
    mesh,
    set_parallel_sizes,
)
from dschat.distributed.process_wide import process_wide
from dschat.errors import UserError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield
    vars(process_wide(ParallelSizes)).clear()


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
    assert place.tensor == place.sequence == place.pipeline == Axis(0, 1)


def test_ranks_without_local_numbers_are_on_one_machine(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert mesh().machine == Axis(1, 2)


def test_eight_ranks_as_two_stages_of_two_data_ranks_of_two_tensor_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    set_parallel_sizes(pipeline=2, tensor=2)
    places = []
    for rank in range(8):
        monkeypatch.setenv("RANK", str(rank))
        place = mesh()
        assert (place.pipeline.size, place.data.size, place.tensor.size) == (2, 2, 2)
        places.append((place.pipeline.rank, place.data.rank, place.tensor.rank))
    assert places == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)]


def test_the_ranks_that_share_a_row_have_one_data_rank(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    set_parallel_sizes(sequence=2)
    assert (mesh().data, mesh().sequence) == (Axis(1, 2), Axis(0, 2))
    assert mesh().zero_size == 4
    assert data_ranks_of(4) == [0, 2]
    monkeypatch.setenv("RANK", "3")
    assert data_ranks_of(1) == [0]  # a run of one process, which had no neighbours


def test_sizes_that_do_not_divide_the_ranks_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(
        UserError, match="pipeline 2 times tensor 2, need a multiple of 4 ranks, and this run has 6"
    ):
        set_parallel_sizes(pipeline=2, tensor=2)
    assert mesh().data.size == 6
