"""Ranks that share the tokens of rows learn, measure and export what one process does."""

import json
from pathlib import Path

import pytest
from figures import timeless_lines
from processes import ROOT, python
from safetensors.torch import load_file
from tiny import save_counting_pairs, save_tiny_model

WORKER = ROOT / "tests" / "workers" / "interrupted_runs.py"
ROUGH = ("--gradient_accumulation_steps=2", "--gradient_checkpointing", "--weight_decay=0.1")
CASES = {
    "sft": ("sft", "llama", *ROUGH),
    "reward": ("reward", "opt", "--zero_stage=3", "--pad_to_multiple_of=1"),
    "dpo": ("dpo", "qwen3", "--zero_stage=2", "--lora_dim=4", "--max_tokens_per_batch=256"),
}
"""The step, the family, and further flags."""
STOPPED = {"sft": {"die_in": 3}}

FAMILIES = ("llama", "opt", "gpt2", "gpt_neox", "qwen3", "mistral")
MATRIX = {
    f"{step}_{family}": (step, family, f"--zero_stage={(place + number) % 4}")
    for place, step in enumerate(("sft", "reward", "dpo"))
    for number, family in enumerate(FAMILIES)
}
"""Every step with every family and at every ZeRO stage."""
MATRIX |= {
    "sft_gemma": ("sft", "gemma", "--zero_stage=1", *ROUGH),
    "sft_mixtral": ("sft", "mixtral", "--zero_stage=2"),
    "dpo_phi_lora": ("dpo", "phi", "--zero_stage=3", "--lora_dim=4", "--only_optimize_lora"),
    "reward_qwen2_lora": ("reward", "qwen2", "--zero_stage=1", "--lora_dim=4"),
    "reward_tokens": ("reward", "llama_mha", "--zero_stage=2", "--max_tokens_per_batch=256"),
    "sft_offload": ("sft", "opt_projected", "--zero_stage=2", "--offload"),
}


def runs_of(folder: Path, cases: dict, stopped: dict, *, ranks: int, size: int) -> list[dict]:
    """Each case whole, and those of `stopped` interrupted and resumed."""
    runs = []
    for case, (step, family, *more) in cases.items():
        if not (folder / family).exists():
            save_tiny_model(folder / family, family)
        rows = 8 // (ranks // size) // (2 if "--gradient_accumulation_steps=2" in more else 1)
        flags = [
            *(f"--model_name_or_path={folder / family}", f"--data_path={folder / 'pairs.jsonl'}"),
            *(f"--data_output_path={folder / f'cache{ranks}'}", f"--sequence_parallel_size={size}"),
            *(f"--per_device_train_batch_size={rows}", "--learning_rate=1e-3", "--adam_epsilon=1e-3"),
            *("--num_train_epochs=1.5", "--data_split=1,1,1", "--save_interval=2", "--eval_fraction=0.2"),
            *("--dtype=fp32", "--preprocessing_num_workers=1", "--no_enable_tensorboard", *more),
        ]
        output = f"--output_dir={folder / f'{case}_on_{ranks}_{size}'}"
        runs.append({"program": step, "flags": [*flags, output]})
        if case in stopped:
            output += "_stopped"
            runs.append({"program": step, "flags": [*flags, output], **stopped[case]})
            runs.append({"program": step, "flags": [*flags, output, "--resume_from_checkpoint"]})
    return runs


def run(folder: Path, cases: dict, stopped: dict, *, ranks: int, size: int, timeout: int = 600) -> str:
    """What the runs print, all of them in one process a rank."""
    if not (folder / "pairs.jsonl").exists():
        save_counting_pairs(folder / "pairs.jsonl")
    file = folder / f"on_{ranks}_{size}.json"
    file.write_text(json.dumps(runs_of(folder, cases, stopped, ranks=ranks, size=size)))
    return python(WORKER, file, ranks=ranks, timeout=timeout).stdout


def assert_equal_to_one_process(folder: Path, case: str, grid: str) -> None:
    alone, shared = (timeless_lines(folder / f"{case}_on_{place}") for place in ("1_1", grid))
    assert len(alone) > 4
    for ours, theirs in zip(shared, alone, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4, rel=1e-4)
    assert_equal_weights(folder, f"{case}_on_{grid}", f"{case}_on_1_1", 1e-6)


def assert_equal_weights(folder: Path, one: str, other: str, difference: float) -> None:
    weights, expected = (load_file(folder / name / "model.safetensors") for name in (one, other))
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (weights[name] - tensor).abs().max() <= difference, name


def assert_same_after_resuming(folder: Path, case: str, grid: str) -> None:
    names = (f"{case}_on_{grid}", f"{case}_on_{grid}_stopped")
    whole, resumed = (timeless_lines(folder / name) for name in names)
    assert resumed == whole
    assert_equal_weights(folder, *names, 0)


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> tuple[Path, str]:
    """The folder of the runs, and what those on two ranks printed."""
    folder = tmp_path_factory.mktemp("shared")
    run(folder, CASES, {}, ranks=1, size=1)
    return folder, run(folder, CASES, STOPPED, ranks=2, size=2)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_that_share_rows_do_what_one_process_does(case, told):
    assert_equal_to_one_process(told[0], case, "2_2")


@pytest.mark.slow
def test_a_run_on_shared_rows_goes_on_bit_by_bit(told):
    folder, text = told
    assert "_stopped Died" in text
    assert_same_after_resuming(folder, "sft", "2_2")


@pytest.mark.slow
def test_rows_that_ranks_share_are_not_packed(told):
    assert told[1].count("packing: padding (ranks that share the tokens of a row") == len(CASES) + 2


@pytest.fixture(scope="module")
def matrix(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("matrix")
    for ranks, size in ((1, 1), (2, 2), (4, 2), (4, 4)):
        stopped = {case: {"die_in": 3} for case in MATRIX if ranks > 1 and "gpt_neox" in case}
        run(folder, MATRIX, stopped, ranks=ranks, size=size, timeout=6000)
    return folder


@pytest.mark.matrix
@pytest.mark.timeout(9000)
@pytest.mark.parametrize("grid", ["2_2", "4_2", "4_4"], ids=lambda grid: f"ranks_and_size_{grid}")
@pytest.mark.parametrize("case", MATRIX)
def test_every_family_and_stage_does_what_one_process_does(case, grid, matrix):
    assert_equal_to_one_process(matrix, case, grid)
    if "gpt_neox" in case:
        assert_same_after_resuming(matrix, case, grid)
