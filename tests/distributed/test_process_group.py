from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import ROOT, python

from dschat.distributed import collectives, process_group
from dschat.distributed.mesh import mesh
from dschat.errors import UserError

WORKER = ROOT / "tests" / "workers" / "collectives.py"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_processes_on_a_cpu_compile_no_collectives_and_leave_no_shared_memory(tmp_path, ranks):
    worker = tmp_path / "joins.py"
    worker.write_text(
        "from dschat.distributed import process_group as g; g.init_process_group(); g.destroy_process_group()"
    )
    extensions, before = tmp_path / "extensions", buffers()
    # LOCAL_SIZE is what the deepspeed launcher sets: all ranks are on this machine.
    env = {"CUDA_VISIBLE_DEVICES": "", "TORCH_EXTENSIONS_DIR": str(extensions), "LOCAL_SIZE": str(ranks)}
    python(worker, ranks=ranks, env=env, afresh=True)
    assert [path.name for path in extensions.rglob("*") if path.is_file()] == []
    assert buffers() <= before


def buffers() -> set[Path]:
    """What DeepSpeed's collectives in shared memory leave behind."""
    return set(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"))


def test_more_processes_than_devices_are_refused_in_one_line(monkeypatch):
    accelerator = SimpleNamespace(device_name=lambda: "cuda", device_count=lambda: 2)
    monkeypatch.setattr(process_group, "get_accelerator", lambda: accelerator)
    monkeypatch.setenv("LOCAL_RANK", "1")
    process_group._check_device()
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="LOCAL_RANK is 2, but this machine shows 2 devices"):
        process_group._check_device()


def test_without_a_group_a_rank_is_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (mesh().world.rank, mesh().world.size, mesh().machine.size) == (0, 1, 1)
    assert collectives.gather_rows(torch.tensor([3]), axis="data").tolist() == [3]
    assert collectives.sum_across_ranks(torch.tensor(2), axis="data").item() == 2
