"""Micro-batches divided by tokens change what a step costs, and nothing that it learns."""

import json
from pathlib import Path

import pytest
from figures import timeless_lines
from processes import ROOT, python
from tiny import save_counting_pairs, save_tiny_model

LAID_OUT = ROOT / "tests" / "workers" / "laid_out_runs.py"
INTERRUPTED = ROOT / "tests" / "workers" / "interrupted_runs.py"
DIVISIONS = {
    "by rows": ["--packing=off"],
    "padded": ["--packing=off", "--max_tokens_per_batch=176"],
    "packed": ["--packing=on", "--max_tokens_per_batch=176"],
}
STAGES = {"sft": {1: 0, 2: 2}, "reward": {1: 0, 2: 3}, "dpo": {1: 2, 2: 0}}
"""ZeRO stages by step and number of ranks."""


def flags(folder: Path, name: str, step: str, ranks: int) -> list[str]:
    # Adam divides a gradient by its size, rounding included; the large epsilon lets small ones be small.
    return [
        *(f"--model_name_or_path={folder / 'base'}", f"--data_path={folder / 'pairs.jsonl'}"),
        *(f"--output_dir={folder / name}", f"--data_output_path={folder / f'cache_{name}'}"),
        *("--data_split=1,1,0", "--eval_fraction=0.2", "--dtype=fp32", "--no_enable_tensorboard"),
        *("--learning_rate=3e-3", "--adam_epsilon=1e-3", "--pad_to_multiple_of=8", "--save_interval=2"),
        *(f"--per_device_train_batch_size={8 // ranks}", f"--zero_stage={STAGES[step][ranks]}"),
        "--preprocessing_num_workers=1",
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("budget")
    save_counting_pairs(folder / "pairs.jsonl")
    save_tiny_model(folder / "base")  # without ReLU, whose gradient jumps where rounding moves a sign
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_curves_are_those_of_micro_batches_by_rows(ranks, folder):
    names = {(step, division): f"{step}_{division}_{ranks}" for step in STAGES for division in DIVISIONS}
    runs = {
        name: (step, [*flags(folder, name, step, ranks), *DIVISIONS[division]])
        for (step, division), name in names.items()
    }
    (folder / "runs.json").write_text(json.dumps(runs))
    said = python(LAID_OUT, folder / "runs.json", ranks=ranks).stdout
    assert "packing: padding" not in said
    for step in STAGES:
        plain, *others = (timeless_lines(folder / names[step, division]) for division in DIVISIONS)
        assert len(plain) > 2
        for other in others:
            for ours, theirs in zip(other, plain, strict=True):
                assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5)


@pytest.mark.slow
def test_a_resumed_run_ends_like_one_that_was_not_stopped(folder):
    whole, stopped = ([*flags(folder, name, "sft", 1), *DIVISIONS["packed"]] for name in ("whole", "stopped"))
    runs = [
        {"program": "sft", "flags": whole},
        {"program": "sft", "flags": stopped, "stop_after": 2},
        {"program": "sft", "flags": [*stopped, "--resume_from_checkpoint"]},
    ]
    (folder / "resumed.json").write_text(json.dumps(runs))
    python(INTERRUPTED, folder / "resumed.json")
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]
    assert timeless_lines(folder / "whole") == timeless_lines(folder / "stopped")


@pytest.mark.slow
def test_a_row_longer_than_the_budget_is_refused_before_the_model_is_loaded(folder):
    given = [*flags(folder, "refused", "sft", 1), "--max_tokens_per_batch=8"]
    result = python(ROOT / "step1_sft" / "main.py", *given, check=False)
    assert result.returncode == 2
    assert "--max_tokens_per_batch 8 is too small: the longest row has" in result.stderr
    assert "loading" not in result.stdout
