"""A trainer of TRL on the rows of benchmarks/versus.py, timed. Run by a Python that has trl.

    python benchmarks/versus_trl.py sft --model MODEL --rows rows.jsonl --output OUT --batch 8 --steps 60

TRL's defaults hold but for what the setting fixes: batch, lengths, bf16, no recomputation of activations,
nothing evaluated, saved or reported in between. Its bf16 is autocast over fp32 weights, which have the master
weights' precision of ours. The model is saved at the end, as ours is.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from versus_marks import Marks, say

MAX_TOKENS = 256


class Note(TrainerCallback):
    """Notes each optimiser step, with the samples and tokens of the batches that were collated in order."""

    def __init__(self, marks: Marks, batches: list[tuple[int, int]]) -> None:
        self.marks, self.batches = marks, batches

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The trainer may have collated the next batch already, so batches are told by their number."""
        self.marks.step(*self.batches[len(self.marks.moments)])


def main() -> None:
    """Train, report, save."""
    args = parse()
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    marks = Marks(args.left_out)
    train = {"sft": sft, "sft-packing": sft, "reward": reward, "ppo": ppo, "rloo": rloo}[args.workload]
    trainer = train(args, tokenizer, rows, marks)
    trainer.train()
    trainer.save_model(str(args.output / "model"))
    say(marks.report())


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("workload", choices=("sft", "sft-packing", "reward", "ppo", "rloo"), help="Which trainer.")
    add("--model", required=True, help="The folder of the model to train.")
    add("--reward", help="The folder of the reward model; of ppo and rloo.")
    add("--rows", type=Path, required=True, help="JSON lines of token ids.")
    add("--output", type=Path, required=True, help="Where the model goes.")
    add("--batch", type=int, required=True, help="Rows, pairs or answers of an optimiser step.")
    add("--steps", type=int, required=True, help="Optimiser steps.")
    add("--left-out", type=int, default=10, help="The first steps, which are not timed.")
    add("--max-answer", type=int, default=128, help="Longest answer in tokens.")
    add("--weights", default="float32", help="The dtype that the weights are loaded in.")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="Where to train.")
    return parser.parse_args()


def common(args: argparse.Namespace) -> dict[str, Any]:
    """What all trainers are told."""
    return {
        "output_dir": str(args.output / "trainer"),
        "per_device_train_batch_size": args.batch,
        "bf16": True,
        "use_cpu": args.device == "cpu",
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10,
        "disable_tqdm": True,
        "learning_rate": 1e-5,
        "seed": 1,
    }


def language_model(args: argparse.Namespace) -> Any:
    """The model to train."""
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.weights))


def reward_model(args: argparse.Namespace, folder: str) -> Any:
    """A model with a head of one label."""
    return AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=getattr(torch, args.weights)
    )


def counting(collate: Any, batches: list[tuple[int, int]], samples_of: Any) -> Any:
    """The collator, which notes of each batch its samples and its tokens."""

    def collate_and_count(rows: list[dict]) -> dict:
        batch = collate(rows)
        tokens = batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel()
        batches.append((samples_of(rows), int(tokens)))
        return batch

    return collate_and_count


def sft(args: argparse.Namespace, tokenizer: Any, rows: list[dict], marks: Marks) -> Any:
    """`SFTTrainer`. Packed rows hold up to 256 tokens of whole examples, and a batch as many rows as
    without."""
    from trl import SFTConfig, SFTTrainer

    packing = args.workload == "sft-packing"
    config = SFTConfig(
        **common(args),
        max_steps=args.steps,
        max_length=MAX_TOKENS,
        packing=packing,
        completion_only_loss=True,
    )
    batches: list[tuple[int, int]] = []
    trainer = SFTTrainer(
        model=language_model(args),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Note(marks, batches)],
    )

    def samples_of(batch: list[dict]) -> int:
        return sum(len(row["seq_lengths"]) if packing else 1 for row in batch)

    trainer.data_collator = counting(trainer.data_collator, batches, samples_of)
    return trainer


def reward(args: argparse.Namespace, tokenizer: Any, rows: list[dict], marks: Marks) -> Any:
    """`RewardTrainer`."""
    from trl import RewardConfig, RewardTrainer

    config = RewardConfig(**common(args), max_steps=args.steps, max_length=MAX_TOKENS)
    batches: list[tuple[int, int]] = []
    trainer = RewardTrainer(
        model=reward_model(args, args.model),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Note(marks, batches)],
    )
    trainer.data_collator = counting(trainer.data_collator, batches, len)
    return trainer


def ppo(args: argparse.Namespace, tokenizer: Any, rows: list[dict], marks: Marks) -> Any:
    """`trl.experimental.ppo`, which TRL 1.12 was the last to have: one minibatch, one pass over it."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    config = PPOConfig(
        **common(args),
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=1,
        total_episodes=args.steps * args.batch,
        local_rollout_forward_batch_size=args.batch,
        response_length=args.max_answer,
        stop_token="eos",
        num_sample_generations=0,
    )
    dataset = Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows])
    return PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=language_model(args),
        ref_model=language_model(args),
        reward_model=reward_model(args, args.reward),
        value_model=reward_model(args, args.reward),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(args.batch)),
        callbacks=[Note(marks, [(args.batch, 0)] * args.steps)],
    )


def rloo(args: argparse.Namespace, tokenizer: Any, rows: list[dict], marks: Marks) -> Any:
    """`RLOOTrainer`, four answers to a prompt. Its reward is a function of token ids, as the model alone
    would be given text without the end token."""
    from trl import RLOOConfig, RLOOTrainer

    scorer = reward_model(args, args.reward).eval()

    @torch.no_grad()
    def score(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        ids = [tokenizer(p)["input_ids"] + c for p, c in zip(prompts, completion_ids, strict=True)]
        batch = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
        with torch.autocast(args.device, torch.bfloat16):
            return scorer.to(args.device)(**batch.to(args.device)).logits[:, 0].float().tolist()

    config = RLOOConfig(
        **common(args),
        generation_batch_size=args.batch,
        num_generations=4,
        max_steps=args.steps,
        max_completion_length=args.max_answer,
    )
    return RLOOTrainer(
        model=language_model(args),
        reward_funcs=score,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=tokenizer,
        callbacks=[Note(marks, [(args.batch, 0)] * args.steps)],
    )


if __name__ == "__main__":
    main()
