"""What benchmarks/versus.py runs: the models, the rows, and the flags of each workload.

Run as a program it prepares the setting in a folder, once: models of random weights with a tokenizer of the
data, the SFT and the reward model that PPO starts from (a few steps of our steps 1 and 2), and the rows of
each workload as token ids, which peers train on. Ours prepares the same rows from the text by itself, from a
warm cache.

    python benchmarks/versus_setting.py FOLDER --hh-data hh/test.jsonl.gz
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

VOCAB_SIZE = 4096
MAX_TOKENS = 256
MAX_PROMPT, MAX_ANSWER = 128, 128
MODELS = ("6m", "89m")
"""Of `random_models.SHAPES`."""


@dataclass(frozen=True)
class Workload:
    """Something that we and the peers do with the same rows."""

    name: str
    title: str
    step: str
    """The step of ours, as `parse_arguments` calls it."""
    program: str
    rows: str
    """The name of the file of rows, without its ending."""
    batch: int
    num_steps: int
    """Optimiser steps of a run without packing; the rows are as many batches."""
    left_out: int
    """The first steps, which are not timed, at least 1."""
    flags: tuple[str, ...]
    model: str = "6m"

    @property
    def num_rows(self) -> int:
        """Rows, pairs or prompts that a run reads."""
        return self.batch * self.num_steps


_SUPERVISED = ("--dtype", "bf16", "--eval_fraction", "0", "--seed", "7")
_SFT = (
    *_SUPERVISED,
    "--data_split",
    "1,0,0",
    "--max_seq_len",
    str(MAX_TOKENS),
    "--per_device_train_batch_size",
    "8",
)
_PPO = (
    *_SUPERVISED, "--data_split", "0,0,1", "--max_prompt_seq_len", str(MAX_PROMPT), "--max_answer_seq_len",
    str(MAX_ANSWER), "--per_device_generation_batch_size", "16", "--per_device_training_batch_size", "16",
    "--ppo_epochs", "1",
)  # fmt: skip

WORKLOADS = {
    w.name: w
    for w in (
        Workload("sft", "SFT, samples/s", "sft", "step1_sft/main.py", "sft", 8, 30, 6, _SFT),
        Workload(
            "reward", "reward model, pairs/s", "reward", "step2_reward/main.py", "pairs", 8, 20, 4,
            (*_SUPERVISED, "--data_split", "0,1,0", "--max_seq_len", str(MAX_TOKENS),
             "--per_device_train_batch_size", "8"),
        ),
        Workload("ppo", "PPO, samples/s", "rlhf", "step3_ppo/main.py", "prompts", 16, 5, 1, _PPO),
        Workload(
            "rloo", "RLOO, samples/s", "rlhf", "step3_ppo/main.py", "prompts", 16, 4, 1,
            (*_PPO, "--advantage_estimator", "rloo", "--num_samples_per_prompt", "4"),
        ),
        Workload("sft-89m", "SFT of 89M, samples/s", "sft", "step1_sft/main.py", "sft-89m", 8, 5, 1, _SFT,
                 "89m"),
    )
}  # fmt: skip


def our_flags(workload: Workload, folder: Path, data: Path, num_steps: int | None = None) -> list[str]:
    """The command line of our program but its output folder; by default for all of the workload's steps.

    Fewer steps than those of an epoch read a part of the epoch, so that the rows are prepared once.
    """
    steps = num_steps or workload.num_steps
    shared = ["--data_path", str(data), "--data_output_path", str(folder / "cache"), *workload.flags]
    if workload.step != "rlhf":
        models = ["--model_name_or_path", str(folder / workload.model)]
        epochs = ["--num_train_epochs", f"{steps / workload.num_steps:g}"]
        return [*models, *shared, "--max_train_samples", str(workload.num_rows), *epochs]
    models = [
        "--actor_model_name_or_path",
        str(folder / "sft"),
        "--critic_model_name_or_path",
        str(folder / "reward"),
    ]
    stop = ["--enable_test_mode", "--test_stop_step", str(steps)]
    return [*models, *shared, *stop]


def main() -> None:
    """Prepare what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="Where everything goes.")
    parser.add_argument("--hh-data", type=Path, required=True, help="JSON lines of preferences, gzip or not.")
    args = parser.parse_args()
    prepare(args.folder, args.hh_data)


def prepare(folder: Path, data: Path) -> None:
    """Models and rows, each written once; `folder`/setting.json is the last file."""
    from families import train_tokenizer
    from random_models import save_random_model

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(data, VOCAB_SIZE)
    sizes = {name: save_random_model(folder / name, name, tokenizer) for name in MODELS}
    for name, model, output in (("sft", "6m", "sft"), ("reward", "sft", "reward")):
        if not (folder / output / "summary.json").exists():
            few = [
                "--max_train_samples",
                "32",
                "--output_dir",
                str(folder / output),
                "--overwrite_output_dir",
            ]
            flags = our_flags(WORKLOADS[name], folder, data)
            flags[flags.index("--model_name_or_path") + 1] = str(folder / model)
            subprocess.run([sys.executable, str(ROOT / WORKLOADS[name].program), *flags, *few], check=True)
    means = {w.name: save_rows(folder, w, data) for w in WORKLOADS.values()}
    setting = {"parameters": sizes, "mean_tokens": means}
    (folder / "setting.json").write_text(json.dumps(setting) + "\n")


def save_rows(folder: Path, workload: Workload, data: Path) -> float:
    """The rows that ours trains on, as token ids for peers and as text. -> mean tokens of a row."""
    from dschat.arguments import parse_arguments
    from dschat.data.preparation import prompt_data, reward_data, sft_data
    from dschat.models.tokenizer import load_tokenizer

    args: Any = parse_arguments(workload.step, our_flags(workload, folder, data))
    tokenizer = load_tokenizer(str(folder / workload.model))
    if workload.step == "sft":
        found = sft_data(args.data, tokenizer, max_seq_len=MAX_TOKENS, seed=args.run.seed).train
        rows = [
            {"input_ids": r["input_ids"], "completion_mask": [int(m) for m in r["loss_mask"]]}
            for r in found.table.to_pylist()
        ]
        lengths = [len(r["input_ids"]) for r in rows]
    elif workload.step == "reward":
        found = reward_data(args.data, tokenizer, max_seq_len=MAX_TOKENS, seed=args.run.seed).train
        rows = [{name: r[name] for name in ("chosen_ids", "rejected_ids")} for r in found.table.to_pylist()]
        lengths = [len(ids) for row in rows for ids in row.values()]
    else:
        found = prompt_data(args.data, tokenizer, max_prompt_seq_len=MAX_PROMPT, seed=args.run.seed).train
        rows = [
            {"input_ids": r["input_ids"], "prompt": tokenizer.decode(r["input_ids"])}
            for r in found.table.to_pylist()
        ]
        lengths = [len(r["input_ids"]) for r in rows]
    path = folder / f"{workload.rows}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sum(lengths) / len(lengths)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    main()
