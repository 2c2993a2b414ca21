"""Where memory runs out: what is said, and that --auto_micro_batch learns the same in smaller parts."""

import json
from pathlib import Path

import pytest
import torch
from processes import ROOT, python
from safetensors.torch import load_file
from tiny import save_tiny_model

from dschat.arguments import parse_arguments
from dschat.engines import out_of_memory
from dschat.engines.memory_remedies import Phase, PhaseKind, memory_flags

WORKER = ROOT / "tests" / "workers" / "out_of_memory.py"
WORDS = ("one", "two", "three", "four", "five", "six")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    rows = [
        {
            "prompt": f"\n\nHuman: Count from {word}{', please' * n}.\n\nAssistant:",
            "chosen": f" {word} and on",
            "rejected": " no",
        }
        for n, word in enumerate(WORDS * 3)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_tiny_model(folder / "base")
    return folder


def sft(folder: Path, output: str, rows: int, *more: str) -> list[str]:
    return [
        f"--model_name_or_path={folder / 'base'}",
        f"--data_path={folder / 'pairs.jsonl'}",
        f"--data_output_path={folder / 'cache'}",
        f"--output_dir={folder / output}",
        f"--per_device_train_batch_size={rows}",
        *("--data_split=1,0,0", "--dtype=fp32", "--learning_rate=1e-3", "--no_enable_tensorboard"),
        *more,
    ]


def run(folder: Path, output: str, rows: int, *more: str, limit: int, rank: int = 0, ranks: int = 1, **how):
    flags = sft(folder, output, rows, *more)
    return python(WORKER, "sft", limit, rank, *flags, ranks=ranks, timeout=200, **how)


def weights(folder: Path, output: str) -> dict[str, torch.Tensor]:
    return load_file(folder / output / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 1)])
def test_a_run_that_starts_again_learns_what_smaller_micro_batches_learn(folder, ranks, rank):
    small, halved = f"small{ranks}", f"halved{ranks}"
    run(folder, small, 2, "--gradient_accumulation_steps=2", limit=99, ranks=ranks)
    result = run(folder, halved, 4, "--auto_micro_batch", limit=2, rank=rank, ranks=ranks, afresh=True)
    assert f"note: rank {rank} ran out of memory while training the model" in result.stdout
    assert "--per_device_train_batch_size 2 and --gradient_accumulation_steps 2" in result.stdout
    ours, theirs = weights(folder, halved), weights(folder, small)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    started = weights(folder, "base")
    assert any(not torch.equal(ours[name], started[name]) for name in started)


@pytest.mark.slow
def test_the_message_names_phase_consumers_and_flags(folder):
    result = run(folder, "fails", 4, limit=2, check=False)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "out of memory while training the model (Tried to allocate 20.00 GiB.)" in result.stderr
    for consumer in ("weights of the model", "activations, caches and all else", "the machine has"):
        assert f"GiB  {consumer}" in result.stderr or consumer in result.stderr
    advice = "--per_device_train_batch_size 4 -> 2 with --gradient_accumulation_steps 1 -> 2"
    assert advice in result.stderr
    assert "--auto_micro_batch does the first by itself" in result.stderr


@pytest.mark.slow
def test_one_row_cannot_be_halved(folder):
    result = run(folder, "one_row", 1, "--auto_micro_batch", limit=0, check=False)
    assert result.returncode == 2
    assert "--gradient_checkpointing" in result.stderr
    assert "per_device_train_batch_size" not in result.stderr


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."), True),
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(2, "No such file"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, is_one):
    assert out_of_memory.is_out_of_memory(error) is is_one


def test_an_error_without_a_message_is_named_by_its_kind():
    flags = memory_flags(parse_arguments("sft", ["--model_name_or_path=a", "--data_path=b"]))
    for error in (MemoryError(), MemoryError("")):
        first = out_of_memory.report(Phase(PhaseKind.EXPORTING), flags, error)[0]
        assert first.endswith("ran out of memory while exporting (MemoryError).")


def test_memory_is_given_back_around_rare_phases(monkeypatch):
    given: list[PhaseKind] = []
    for kind in PhaseKind:
        monkeypatch.setattr(out_of_memory, "give_back_memory", lambda kind=kind: given.append(kind))
        with out_of_memory.phase(kind):
            pass
    assert given == [kind for kind in out_of_memory.RARE for _ in ("before", "after")]
