"""PPO that is stopped anywhere and resumed ends with the weights and figures of a run that was not."""

import json
import math
import sys
from pathlib import Path

import pytest
from processes import ROOT, python
from safetensors.torch import load_file
from tiny import save_reward_model, save_tiny_model
from torch.testing import assert_close as close

sys.path.insert(0, str(ROOT / "benchmarks"))

from faults import outcome

WORKER = ROOT / "tests" / "workers" / "interrupted_ppo.py"

FLAGS = {
    "max_prompt_seq_len": 24,
    "max_answer_seq_len": 8,
    "per_device_generation_batch_size": 4,
    "generation_batches": 2,
    "per_device_training_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "ppo_epochs": 2,
    "num_warmup_steps": 2,
    "actor_learning_rate": 1e-3,
    "critic_learning_rate": 1e-3,
    "data_split": "0,0,1",
    "eval_fraction": 0.1,
    "dtype": "fp32",
}
HALF_A_RANK = {"generation_batches": 1, "gradient_accumulation_steps": 1}
STEERED = {"kl_target": 0.05, "kl_horizon": 50, "score_normalization": "running", "enable_ema": True}
UPDATES = 12
"""Optimiser steps of a run: 3 PPO steps of 2 passes over 2 minibatches."""

# What is trained and where it is stopped, on one rank.
ONE_RANK = {
    "plain": ({}, (1, 4, 6, UPDATES)),
    "bf16": ({"dtype": "bf16"}, (7,)),
    "steered, with EMA": (STEERED, (2, 8, 11)),
    "adapters alone": ({"actor_lora_dim": 4, "critic_lora_dim": 4, "only_optimize_lora": True}, (5,)),
    "zero 2 bf16": ({"actor_zero_stage": 2, "critic_zero_stage": 1, "dtype": "bf16"}, (5,)),
    "text": ({"unsupervised_dataset_name": "text.txt"}, (6,)),
    "rloo": ({"advantage_estimator": "rloo", "num_samples_per_prompt": 2}, (3,)),
    "early stop": ({"target_approx_kl": 1e-3}, (2, 7)),
    "critic warm-up": ({"critic_warmup_steps": 1}, (2, 5)),
    "tis": ({"rollout_correction": "tis"}, (3,)),
}
TWO_RANKS = {
    "zero 2 and 3": ({"actor_zero_stage": 2, "critic_zero_stage": 3, **STEERED}, (6,)),
    "zero 3, EMA, bf16": (
        {"actor_zero_stage": 3, "critic_zero_stage": 0, "dtype": "bf16", **STEERED},
        (3, 4),
    ),
}


def save_models_and_pairs(folder: Path, family: str = "llama") -> None:
    """What `flags_of` names in the folder."""
    save_tiny_model(folder / "actor", family)
    save_tiny_model(folder / "base", family, seed=1)
    save_reward_model(folder / "base", folder / "reward")
    rows = [
        {"prompt": f"\n\nHuman: Count to {n}.\n\nAssistant:", "chosen": " one", "rejected": " two"}
        for n in range(27)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ppo")
    save_models_and_pairs(folder)
    (folder / "text.txt").write_text("".join(f"{n} bottles of water on the wall.\n" for n in range(300)))
    return folder


def flags_of(folder: Path, output: str, options: dict) -> list[str]:
    models = {"actor_model_name_or_path": folder / "actor", "critic_model_name_or_path": folder / "reward"}
    paths = {"data_path": folder / "pairs.jsonl", "data_output_path": folder / "cache"}
    if "unsupervised_dataset_name" in options:
        options = options | {"unsupervised_dataset_name": folder / options["unsupervised_dataset_name"]}
    settings = {**models, **paths, "output_dir": folder / output, **FLAGS, **options}
    return [f"--{name}={value}" for name, value in settings.items()]


def run_all(folder: Path, cases: dict, ranks: int, shared: dict) -> str:
    """Every case straight, and stopped at each of its moments and resumed."""
    runs = []
    for name, (options, moments) in cases.items():
        options = shared | options
        runs.append({"flags": flags_of(folder, f"{name} {ranks} straight", options)})
        for moment in moments:
            flags = flags_of(folder, f"{name} {ranks} {moment}", options)
            runs.append({"flags": flags, "stop_after": moment})
            runs.append({"flags": [*flags, "--resume_from_checkpoint=latest"]})
    (folder / f"runs{ranks}.json").write_text(json.dumps(runs))
    return python(WORKER, folder / f"runs{ranks}.json", ranks=ranks).stdout


@pytest.fixture(scope="module")
def one_rank(folder) -> str:
    return run_all(folder, ONE_RANK, 1, {})


@pytest.fixture(scope="module")
def two_ranks(folder) -> str:
    return run_all(folder, TWO_RANKS, 2, HALF_A_RANK)


def cases(table: dict) -> list[tuple[str, int]]:
    return [(name, moment) for name, (_, moments) in table.items() for moment in moments]


def check(folder: Path, name: str, ranks: int, moment: int, said: str) -> None:
    stopped = folder / f"{name} {ranks} {moment}"
    assert f"== {stopped} stopped: stopped after step {moment} as SIGUSR1 asked; saved in" in said
    assert f"going on from checkpoint {stopped}/checkpoints/step_{moment:08d}" in said
    expected, found = outcome(folder / f"{name} {ranks} straight"), outcome(stopped)
    assert len(found["weights"]) >= 1
    assert sum("score" in line for line in found["metrics"]) >= 3
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize(("name", "moment"), cases(ONE_RANK))
def test_a_stopped_run_ends_as_one_that_was_not(folder, one_rank, name, moment):
    check(folder, name, 1, moment, one_rank)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "moment"), cases(TWO_RANKS))
def test_on_two_ranks_too(folder, two_ranks, name, moment):
    check(folder, name, 2, moment, two_ranks)


@pytest.mark.parametrize(("before", "after"), [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_on_another_number_of_ranks_the_figures_go_on(folder, one_rank, before, after):
    """Stopped in the middle of a PPO step and between two, the average whole or in a part a rank."""
    runs = {}
    for stage in (2, 3):
        for moment in (7, 8):
            options = STEERED | {"actor_zero_stage": stage}
            runs[f"moved {before} {stage} {moment}"] = (options, moment)
    for name, ranks in (("before", before), ("after", after)):
        batches = HALF_A_RANK if ranks == 2 else {}
        listed = [
            {"flags": flags_of(folder, output, options | batches), "stop_after": moment}
            for output, (options, moment) in runs.items()
        ]
        if name == "after":
            listed = [{"flags": [*run["flags"], "--resume_from_checkpoint=latest"]} for run in listed]
        (folder / f"{name}.json").write_text(json.dumps(listed))
        python(WORKER, folder / f"{name}.json", ranks=ranks)
    whole = folder / "steered, with EMA 1 straight"
    expected, average = outcome(whole)["metrics"], load_file(whole / "actor_ema" / "model.safetensors")
    compared = {"score", "kl", "answer_length", "kl_coef", "eval_score", "approx_kl", "value_loss"}
    for output in runs:
        found = outcome(folder / output)["metrics"]
        for line, other in zip(found, expected, strict=True):
            for name in line.keys() & compared:
                assert math.isclose(line[name], other[name], rel_tol=1e-3, abs_tol=1e-3), (output, name)
        close(load_file(folder / output / "actor_ema" / "model.safetensors"), average, rtol=1e-4, atol=1e-5)
