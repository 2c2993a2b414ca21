"""Ranks with disks of their own find each other's files, save to their own disks and go on from there."""

import json

import pytest
from processes import ROOT, python

from dschat.distributed.storage import Storage


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each of two ranks on disks of their own has found."""
    folder = tmp_path_factory.mktemp("disks")
    for rank in range(2):
        (folder / f"disk_{rank}").mkdir()
    found_output = python(ROOT / "tests" / "workers" / "two_disks.py", folder, ranks=2).stderr
    found = [json.loads((folder / f"found_{rank}.json").read_text()) for rank in range(2)]
    return [{**ours, "output": found_output} for ours in found]


def test_ranks_know_who_sees_the_same_folder(found):
    for ours in found:
        assert ours["own disks"] == [[0], [1]]
        assert ours["one disk"] == [[0, 1]]


def test_files_are_copied_whole_in_chunks_and_what_nobody_has_is_left_out(found):
    assert found[0]["problem"] is None
    assert found[0]["fetched"] == [2560, 0]


def test_hosts_with_other_data_end_before_a_model_is_loaded(found):
    for ours in found:
        assert "--data_path: the files on " in ours["other data"]
        assert "(rank 1) are others than those on " in ours["other data"]


def test_each_disk_has_the_checkpoints_of_its_own_ranks(found):
    for rank, ours in enumerate(found):
        names = [f"rank_0000{rank}.json", f"rank_0000{rank}.safetensors"]
        folders = [f"out/checkpoints/step_0000000{step}" for step in (2, 3)]
        assert ours["files"] == [f"{folder}/{name}" for folder in folders for name in names]


def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole_on_all_disks(found):
    for rank, ours in enumerate(found):
        assert ours["stayed"] == {"step": 3, "tensor": [10.0 + rank]}
        assert ours["damaged"] == {"step": 2, "tensor": [10.0 + rank]}


def test_ranks_that_have_moved_to_other_disks_get_their_files_from_there(found):
    for rank, ours in enumerate(found):
        assert ours["moved"] == {"step": 2, "tensor": [10.0 + rank]}


def test_the_results_are_on_every_disk(found):
    for ours in found:
        assert {"model.safetensors", "summary.json", "arguments.json"} <= set(ours["results"])


def test_the_lowest_rank_of_a_disk_writes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    writers = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        writers.append(Storage(((0, 1), (2, 3))).is_writer)
    assert writers == [True, False, True, False]
