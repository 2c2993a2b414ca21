import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import ROOT, python
from safetensors import SafetensorError

from dschat.distributed import collectives, device, process_group, random_state
from dschat.distributed.mesh import mesh
from dschat.errors import UserError
from dschat.program import readable_errors

WORKER = ROOT / "tests" / "workers" / "collectives.py"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("collectives")
    python(WORKER, folder, ranks=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_collectives_on_two_ranks(two_ranks):
    for result in two_ranks:
        assert result["sum"] == [3, 30]
        assert result["max"] == [-1, -10]
        assert result["largest"] == 5
        assert result["gathered"] == [[1, 10], [2, 20]]
        assert result["flags"] == [True, False]
        assert result["texts"] == ["0", "néné1"]
        assert result["broadcast"] == {"rank": 0}
        # The values of tests/test_statistics.py, dealt to two ranks: clustered there as on one.
        assert result["standard_error"] == pytest.approx((1.04 * 3 / 2) ** 0.5 / 5)
    assert [result["is_main"] for result in two_ranks] == [True, False]


@pytest.mark.parametrize("ranks", [1, 2])
def test_processes_on_a_cpu_compile_no_collectives_and_leave_no_shared_memory(tmp_path, ranks):
    worker = tmp_path / "joins.py"
    worker.write_text(
        "from dschat.distributed import process_group as g; g.init_process_group(); g.destroy_process_group()"
    )
    extensions, before = tmp_path / "extensions", buffers()
    # LOCAL_SIZE is what the deepspeed launcher sets: all ranks are on this machine.
    env = {"CUDA_VISIBLE_DEVICES": "", "TORCH_EXTENSIONS_DIR": str(extensions), "LOCAL_SIZE": str(ranks)}
    python(worker, ranks=ranks, env=env)
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works on a GPU")
def test_fp16_on_a_cpu_says_what_to_use():
    with pytest.raises(UserError, match=r"--dtype fp16 .* --dtype bf16 or fp32"):
        device.check_precision("fp16", offload=False)


def test_offload_without_a_compiler_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(UserError, match=r"--offload .* g\+\+"):
        device.check_precision("bf16", offload=True)


def test_equal_seeds_give_equal_draws():
    draws = []
    for _ in range(2):
        random_state.seed_everything(7)
        draws.append(torch.rand(3).tolist())
    assert draws[0] == draws[1]


def test_each_rank_draws_numbers_of_its_own_and_the_same_again(monkeypatch):
    draws = {}
    for rank in (0, 1, 0):
        monkeypatch.setenv("RANK", str(rank))
        random_state.seed_ranks_apart(2**63 - 1)
        drawn = torch.rand(3).tolist()
        assert draws.setdefault(rank, drawn) == drawn
    assert draws[0] != draws[1]


@pytest.mark.parametrize(("error", "code"), [(UserError("give another file"), 2), (KeyboardInterrupt(), 130)])
def test_an_error_for_people_is_one_line_and_an_exit_code(error, code, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as ended, readable_errors():
        raise error
    assert ended.value.code == code
    assert capsys.readouterr().err.strip() in ("error: give another file", "interrupted")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "out/summary.json"),
        OSError(errno.EROFS, "Read-only file system"),
        SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
    ],
)
def test_a_disk_that_takes_no_more_is_no_bug(error, capsys):
    with pytest.raises(SystemExit) as ended, readable_errors():
        raise error
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: nothing more can be written: ")
    assert "--resume_from_checkpoint latest" in told


def test_what_goes_wrong_with_files_is_said_to_all_ranks():
    def full() -> None:
        raise SafetensorError("no room")

    assert collectives.first_error_across_ranks(full, axis="world") == "rank 0: no room"
    assert collectives.first_error_across_ranks(lambda: None, axis="world") is None
    assert (
        collectives.first_error_across_ranks(lambda: "a folder is missing", axis="world")
        == "rank 0: a folder is missing"
    )


def test_debug_and_bugs_keep_their_traceback():
    with pytest.raises(UserError), readable_errors(debug=True):
        raise UserError("x")
    with pytest.raises(ZeroDivisionError), readable_errors():
        raise ZeroDivisionError
