"""How rows are laid out for a model changes what a step costs, and nothing that it learns."""

import json
from pathlib import Path

import pytest
from processes import ROOT, python
from tiny import save_counting_pairs, save_tiny_model

WORKER = ROOT / "tests" / "workers" / "laid_out_runs.py"
LAYOUTS = {
    "plain": ["--packing=off", "--pad_to_multiple_of=1"],
    "round": ["--packing=off", "--pad_to_multiple_of=16"],
    "packed": ["--packing=on"],
}
STEPS = ("sft", "reward", "dpo")


def flags(folder: Path, name: str, ranks: int) -> list[str]:
    # Adam divides a gradient by its size, rounding included; the large epsilon lets small ones be small.
    return [
        *(f"--model_name_or_path={folder / 'base'}", f"--data_path={folder / 'pairs.jsonl'}"),
        *(f"--output_dir={folder / name}", f"--data_output_path={folder / f'cache_{name}'}"),
        *("--data_split=1,1,0", "--eval_fraction=0.2", "--dtype=fp32", "--no_enable_tensorboard"),
        *("--learning_rate=3e-3", "--adam_epsilon=1e-3", "--gradient_accumulation_steps=2"),
        *(f"--per_device_train_batch_size={8 // ranks}", f"--zero_stage={ranks - 1}"),
        "--preprocessing_num_workers=1",
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    save_counting_pairs(folder / "pairs.jsonl")
    save_tiny_model(folder / "base", "opt")
    for ranks in (1, 2):
        runs = {
            f"{step}_{name}_{ranks}": (step, [*flags(folder, f"{step}_{name}_{ranks}", ranks), *layout])
            for step in STEPS
            for name, layout in LAYOUTS.items()
        }
        (folder / "runs.json").write_text(json.dumps(runs))
        said = python(WORKER, folder / "runs.json", ranks=ranks).stdout
        assert "packing: padding" not in said
    return folder


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("step", STEPS)
def test_the_curves_of_padded_rounded_and_packed_rows_are_equal(step, ranks, folder):
    plain, *others = (lines(folder / f"{step}_{name}_{ranks}") for name in LAYOUTS)
    assert len(plain) > 3
    for other in others:
        for ours, theirs in zip(other, plain, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dpo_starts_from_exactly_its_reference_in_every_layout(layout, folder):
    start, first = lines(folder / f"dpo_{layout}_1")[:2]
    assert start["eval_reward_margin"] == first["reward_margin"] == 0
