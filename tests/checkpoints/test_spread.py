"""What checkpoints on several disks are worth together; with ranks in tests/distributed/test_storage.py."""

import pytest

from dschat.checkpoints.spread import OF_A_RANK, damage_of_all, holdings, spread_facts
from dschat.distributed.storage import Storage
from dschat.runs.atomic_folder import flushed, mark_complete, names_of_files


@pytest.fixture
def disks(tmp_path, monkeypatch):
    """A checkpoint of two ranks, each with a disk of its own."""
    folders = [tmp_path / str(rank) / "step_00000001" for rank in range(2)]
    for rank, folder in enumerate(folders):
        folder.mkdir(parents=True)
        (folder / f"rank_0000{rank}.json").write_text("{}")
        (folder / "progress.json").write_text("{}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = [flushed(folder, names_of_files(folder)) for folder in folders]
    for rank, folder in enumerate(folders):
        monkeypatch.setenv("RANK", str(rank))
        mark_complete(folder, found[rank], serial=1, **spread_facts(Storage(((0,), (1,))), found))
    return folders


def test_two_disks_have_a_checkpoint_whole_together(disks):
    held = [holdings([folder]) for folder in disks]
    assert damage_of_all(disks[0], held) is None
    assert held[0]["step_00000001"]["ranks"] == [0]


def test_what_is_on_a_disk_that_is_gone_is_named_with_its_rank(disks):
    lost = "rank_00001.json, which rank 1 wrote to the disk of its own host, is on no host of this run"
    assert damage_of_all(disks[0], [holdings(disks[:1])]) == lost
    (disks[0] / "rank_00001.json").write_text("{}")  # copied from the other disk by hand
    assert damage_of_all(disks[0], [holdings(disks[:1])]) is None


def test_damage_is_named_with_the_host(disks):
    (disks[1] / "rank_00001.json").write_text("[]")
    held = [holdings([folder]) for folder in disks]
    assert damage_of_all(disks[0], held).startswith("on the host of rank 1 rank_00001.json is corrupted")


@pytest.mark.parametrize(
    ("name", "is_own"),
    [
        ("rank_00001.json", True),
        ("model/zero_pp_rank_1_mp_rank_00_optim_states.pt", True),
        ("model/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", True),
        ("model/mp_rank_00_model_states.pt", False),
        ("model/layer_00-model_states.pt", False),
        ("progress.json", False),
    ],
)
def test_files_of_one_rank_are_told_from_those_of_all(name, is_own):
    assert bool(OF_A_RANK.search(name)) is is_own
