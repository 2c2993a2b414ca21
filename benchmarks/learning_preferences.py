"""Part c of benchmarks/learning.py: the three steps on real preferences, small models made from nothing."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from families import save_base, train_tokenizer

SHAPE = argparse.Namespace(hidden_size=128, num_layers=4)
VOCAB_SIZE = 4096
MAX_TOKENS = 256
DATA = ("--eval_fraction", "0.2", "--data_split", "2,5,3", "--dtype", "fp32")
TRAIN = (
    *DATA, "--max_seq_len", str(MAX_TOKENS), "--per_device_train_batch_size", "16",
    "--per_device_eval_batch_size", "32", "--num_warmup_steps", "10",
)  # fmt: skip
SFT = (*TRAIN, "--num_train_epochs", "2", "--learning_rate", "1e-3")
REWARD = (*TRAIN, "--num_train_epochs", "2", "--learning_rate", "3e-4")
PPO = (
    *DATA, "--max_prompt_seq_len", "128", "--max_answer_seq_len", "32", "--normalize_scores",
    "--per_device_generation_batch_size", "64", "--per_device_training_batch_size", "32", "--ppo_epochs", "2",
    "--num_train_epochs", "2", "--actor_learning_rate", "1e-4", "--critic_learning_rate", "3e-4",
    "--num_warmup_steps", "5", "--kl_coef", "0.05",
)  # fmt: skip

Step = Callable[[str, Path, list[str]], dict[str, Any]]
"""Runs the program of that name with these flags into this folder, and gives its summary."""
Short = Callable[[str], list[str]]
"""The flags that make the run of a step quick, if any."""


def prepare(data: Path, folder: Path) -> Path:
    """A model of random weights with a tokenizer of the data. -> its folder."""
    base = folder / "base_model"
    if not (base / "config.json").exists():
        save_base(base, "llama", train_tokenizer(data, VOCAB_SIZE), SHAPE)
    return base


def run_seed(step: Step, data: Path, folder: Path, seed: int, *, short: Short) -> dict[str, Any]:
    """The three steps with one seed, which also decides what is held out."""
    home = folder / f"seed{seed}"
    common = ["--data_path", str(data), "--seed", str(seed)]
    base = folder / "base_model"
    flags = ["--model_name_or_path", str(base), *common, *SFT, *short("sft")]
    step("step1_sft/main.py", home / "sft", flags)
    reward = step(
        "step2_reward/main.py",
        home / "reward",
        ["--model_name_or_path", str(home / "sft"), *common, *REWARD, *short("reward")],
    )
    models = [
        "--actor_model_name_or_path", str(home / "sft"), "--critic_model_name_or_path", str(home / "reward")
    ]  # fmt: skip
    ppo = step("step3_ppo/main.py", home / "ppo", [*models, *common, *PPO, *short("ppo")])
    lengths = answer_lengths(data, home / "sft", seed)
    return {
        "seed": seed,
        "accuracy": reward["eval_accuracy"],
        "accuracy_stderr": reward["eval_accuracy_stderr"],
        "num_pairs": reward["num_eval_rows"],
        **{f"longer_{name}": value for name, value in longer_is_better(lengths).items()},
        "curve": read_curve(home / "ppo"),
        "seconds": ppo["seconds"],
    }


def answer_lengths(data: Path, tokenizer_folder: Path, seed: int) -> list[tuple[int, int]]:
    """Tokens of the chosen and of the rejected answer of each pair that step 2 held out."""
    from dschat.arguments import parse_arguments
    from dschat.data.preparation import reward_data
    from dschat.models.tokenizer import load_tokenizer

    flags = ["--model_name_or_path", str(tokenizer_folder), "--data_path", str(data), "--seed", str(seed)]
    args = parse_arguments("reward", [*flags, *REWARD])
    rows = reward_data(
        args.data, load_tokenizer(str(tokenizer_folder)), max_seq_len=MAX_TOKENS, seed=seed
    ).evaluation
    return list(zip(rows.lengths("chosen_ids").tolist(), rows.lengths("rejected_ids").tolist(), strict=True))


def longer_is_better(lengths: list[tuple[int, int]]) -> dict[str, float]:
    """How often the longer of two answers is the chosen one; a tie counts half. With its standard error."""
    right = [(chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in lengths]
    mean = sum(right) / len(right)
    variance = sum((value - mean) ** 2 for value in right) / len(right)
    return {"accuracy": mean, "accuracy_stderr": math.sqrt(variance / len(right))}


def read_curve(folder: Path) -> list[dict[str, float]]:
    """Step, KL, score and, where a run was watched, checked success of every PPO step; the evaluation
    before the first, step 0, is none."""
    names = ("step", "kl", "score", "checked_success")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in names if name in row} for row in rows if "kl" in row]
