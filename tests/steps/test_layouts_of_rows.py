"""How rows are laid out, and the way of attention, change what a step costs, and nothing that it learns."""

import json
from pathlib import Path

import pytest
from figures import timeless_lines
from processes import ROOT, python
from tiny import save_counting_pairs, save_reward_model, save_tiny_model

WORKER = ROOT / "tests" / "workers" / "laid_out_runs.py"
LAYOUTS = {
    "plain": ["--packing=off", "--pad_to_multiple_of=1"],
    "round": ["--packing=off", "--pad_to_multiple_of=16"],
    "packed": ["--packing=on"],
    "under_a_mask": ["--packing=on", "--attn_implementation=sdpa"],
    "eager": ["--packing=off", "--pad_to_multiple_of=1", "--attn_implementation=eager"],
}


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


def ppo_flags(folder: Path, name: str, ranks: int) -> list[str]:
    """Two PPO steps of two passes with two optimiser steps each, of two micro-batches."""
    models = {"actor": folder / "base", "critic": folder / "score"}
    return [
        *(f"--{model}_model_name_or_path={path}" for model, path in models.items()),
        *(f"--{model}_zero_stage={ranks - 1}" for model in models),
        *(f"--{model}_learning_rate=1e-3" for model in models),
        *(f"--output_dir={folder / name}", f"--data_output_path={folder / f'cache_{name}'}"),
        *(f"--data_path={folder / 'pairs.jsonl'}", "--data_split=1,1,2", "--eval_fraction=0.2"),
        *("--dtype=fp32", "--no_enable_tensorboard", "--preprocessing_num_workers=1"),
        *(f"--per_device_generation_batch_size={16 // ranks}", "--adam_epsilon=1e-3", "--eval_interval=1"),
        *(f"--per_device_training_batch_size={4 // ranks}", "--gradient_accumulation_steps=2"),
        *("--ppo_epochs=2", "--max_answer_seq_len=12", "--num_warmup_steps=0", "--num_eval_prompts=8"),
        *("--enable_test_mode", "--test_stop_step=2", "--entropy_coef=0.01", "--rollout_backend=hf"),
    ]


def layout_flags(step: str, layout: str) -> list[str]:
    """Those of a layout, in step 3 for both models."""
    if step != "rlhf":
        return LAYOUTS[layout]
    own = [flag for flag in LAYOUTS[layout] if flag.startswith("--attn")]
    shared = [flag for flag in LAYOUTS[layout] if flag not in own]
    return [*shared, *(flag.replace("--", f"--{model}_") for model in ("actor", "critic") for flag in own)]


STEPS = {"sft": flags, "reward": flags, "dpo": flags, "rlhf": ppo_flags}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    save_counting_pairs(folder / "pairs.jsonl")
    save_tiny_model(folder / "base", "opt")
    save_reward_model(folder / "base", folder / "score")
    for ranks in (1, 2):
        runs = {
            f"{step}_{name}_{ranks}": (
                step,
                [*flags_of(folder, f"{step}_{name}_{ranks}", ranks), *layout_flags(step, name)],
            )
            for step, flags_of in STEPS.items()
            for name in LAYOUTS
        }
        (folder / "runs.json").write_text(json.dumps(runs))
        said = python(WORKER, folder / "runs.json", ranks=ranks).stdout
        assert "packing: padding" not in said
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("step", STEPS)
def test_the_curves_are_equal_in_every_layout_and_with_every_attention(step, ranks, folder):
    plain, *others = (timeless_lines(folder / f"{step}_{name}_{ranks}") for name in LAYOUTS)
    assert len(plain) > 2
    for other in others:
        for ours, theirs in zip(other, plain, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dpo_starts_from_exactly_its_reference_in_every_layout(layout, folder):
    start, first = timeless_lines(folder / f"dpo_{layout}_1")[:2]
    assert start["eval_reward_margin"] == first["reward_margin"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ppo_learns_from_exactly_the_packs_that_it_analysed(layout, ranks, folder):
    steps = [line for line in timeless_lines(folder / f"rlhf_{layout}_{ranks}") if line["step"]]
    assert [line["first_minibatch_ratio_error"] for line in steps] == [0, 0]
    assert steps[0]["kl"] == 0
