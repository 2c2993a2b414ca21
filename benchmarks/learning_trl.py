"""TRL's PPO or RLOO on the models and prompts of benchmarks/learning.py. Run by a Python that has trl.

    python benchmarks/learning_trl.py --method ppo --sft SFT --reward REWARD --prompts prompts.jsonl \\
        --learning-rate 1e-4 --kl-coef 0.3 --steps 57 --output OUT

Writes OUT/actor, OUT/metrics.jsonl (`step`, `kl`, `score`, `checked_success`), OUT/summary.json (`seconds`),
named as step 3 names them. Of this project it imports only the checker of the demo task.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import torch
from datasets import Dataset
from demo_task import check_answer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


def main() -> None:
    """Train, then write the actor and the figures."""
    args = parse()
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.sft, padding_side="left")
    prompts = [json.loads(line) for line in args.prompts.read_text().splitlines()]
    train = {"ppo": train_ppo, "rloo": train_rloo}[args.method]
    policy, rows, seconds = train(args, tokenizer, prompts)
    policy.save_pretrained(args.output / "actor")
    tokenizer.save_pretrained(args.output / "actor")
    (args.output / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (args.output / "summary.json").write_text(json.dumps({"seconds": seconds}) + "\n")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--method", choices=("ppo", "rloo"), required=True, help="Which trainer.")
    add("--sft", required=True, help="The folder of step 1's model.")
    add("--reward", required=True, help="The folder of step 2's model.")
    add("--prompts", type=Path, required=True, help="JSON lines of input_ids and prompt.")
    add("--output", type=Path, required=True, help="Where the actor and the figures go.")
    add("--seed", type=int, default=1, help="TRL's seed.")
    add("--learning-rate", type=float, required=True, help="Of policy and value model, which share it.")
    add("--kl-coef", type=float, required=True, help="TRL's kl_coef of PPO, beta of RLOO.")
    add("--epochs", type=int, default=2, help="Passes over each batch of answers.")
    add("--steps", type=int, required=True, help="Batches of answers.")
    add("--batch", type=int, default=128, help="Answers of a batch.")
    add("--minibatch", type=int, default=64, help="Answers of an optimiser step.")
    add("--samples", type=int, default=4, help="Answers a prompt gets; of RLOO.")
    add("--max-answer", type=int, default=20, help="Longest answer in tokens.")
    return parser.parse_args()


def common(args: argparse.Namespace) -> dict[str, Any]:
    """What both trainers are told: fp32 on a CPU, nothing saved or reported, TRL's defaults otherwise."""
    return {
        "output_dir": str(args.output / "trainer"),
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "temperature": 1.0,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def reward_model(args: argparse.Namespace) -> torch.nn.Module:
    """Step 2's model as transformers loads it."""
    return AutoModelForSequenceClassification.from_pretrained(args.reward, num_labels=1, dtype=torch.float32)


def language_model(args: argparse.Namespace) -> torch.nn.Module:
    """Step 1's model."""
    return AutoModelForCausalLM.from_pretrained(args.sft, dtype=torch.float32)


def share_right(prompts: list[str], answers: list[str]) -> float:
    """The share of answers without a fault."""
    return sum(not check_answer(p, a) for p, a in zip(prompts, answers, strict=True)) / len(answers)


def train_ppo(args: argparse.Namespace, tokenizer: Any, prompts: list[dict]) -> tuple[Any, list[dict], float]:
    """`trl.experimental.ppo`. -> policy, metrics of each step, seconds.

    The batch is one micro-batch that `num_mini_batches` cuts: with gradient accumulation TRL would take an
    optimiser step a batch and not a minibatch.
    """
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    config = PPOConfig(
        **common(args),
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=1,
        num_mini_batches=args.batch // args.minibatch,
        num_ppo_epochs=args.epochs,
        total_episodes=args.steps * args.batch,
        local_rollout_forward_batch_size=args.batch,
        response_length=args.max_answer,
        stop_token="eos",
        kl_coef=args.kl_coef,
        num_sample_generations=0,
    )
    rights: list[float] = []
    generate = ppo_trainer.batch_generation

    def generate_and_check(model: Any, queries: torch.Tensor, *rest: Any) -> tuple:
        answered, logits = generate(model, queries, *rest)
        ended = ppo_trainer.truncate_response(
            tokenizer.eos_token_id, tokenizer.pad_token_id, answered[:, queries.shape[1] :]
        )
        texts = tokenizer.batch_decode(ended, skip_special_tokens=True)
        rights.append(share_right(tokenizer.batch_decode(queries, skip_special_tokens=True), texts))
        return answered, logits

    ppo_trainer.batch_generation = generate_and_check
    dataset = Dataset.from_list([{"input_ids": row["input_ids"]} for row in prompts])
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=language_model(args),
        ref_model=language_model(args),
        reward_model=reward_model(args),
        value_model=reward_model(args),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(args.batch)),
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    logged = [row for row in trainer.state.log_history if "objective/kl" in row]
    rows = [
        {"step": n, "kl": row["objective/kl"], "score": row["objective/scores"], "checked_success": right}
        for n, (row, right) in enumerate(zip(logged, rights, strict=True), start=1)
    ]
    return trainer.policy_model, rows, seconds


def train_rloo(
    args: argparse.Namespace, tokenizer: Any, prompts: list[dict]
) -> tuple[Any, list[dict], float]:
    """`trl.RLOOTrainer`. -> policy, metrics of each batch of answers, seconds.

    Its reward is a function of token ids: given a model, TRL would score text without the end token that the
    reward model was trained to read.
    """
    from trl import RLOOConfig, RLOOTrainer

    model, rewards, rows = language_model(args), reward_model(args).eval(), []
    config = RLOOConfig(
        **common(args),
        per_device_train_batch_size=args.minibatch,
        generation_batch_size=args.batch,
        num_iterations=args.epochs,
        num_generations=args.samples,
        max_steps=args.steps * args.epochs * (args.batch // args.minibatch),
        max_completion_length=args.max_answer,
        beta=args.kl_coef,
    )

    @torch.no_grad()
    def score(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        ids = [tokenizer(p)["input_ids"] + c for p, c in zip(prompts, completion_ids, strict=True)]
        batch = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
        scores = rewards(**batch).logits[:, 0]
        rows.append({"score": scores.mean().item(), "checked_success": share_right(prompts, completions)})
        return scores.tolist()

    for row in prompts[:8]:
        assert tokenizer(row["prompt"])["input_ids"] == row["input_ids"], "the prompt's text has other tokens"
    trainer = RLOOTrainer(
        model=model,
        reward_funcs=score,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in prompts]),
        processing_class=tokenizer,
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    # Its `kl` is a mean over tokens, ours a sum over an answer; it is logged once a batch of answers.
    kls = [row["kl"] * row["completions/mean_length"] for row in trainer.state.log_history if "kl" in row]
    steps = enumerate(zip(kls, rows, strict=True), start=1)
    return trainer.model, [{"step": n, "kl": kl, **row} for n, (kl, row) in steps], seconds


if __name__ == "__main__":
    main()
