"""Speed, phases, memory and share of the matrix peak of each training step, from random weights and random
text.

python benchmarks/steps.py --model 6m
python benchmarks/steps.py --device cuda --model opt-1.3b

SFT, reward model, DPO and PPO run as their programs, each in a process of its own, without an output folder.
The first steps are not timed. The share is of the speed of matrix products of the model's own shapes,
measured first (`matrix_peak.py`); operations are those that the model needs for the tokens that are no
padding, so padding, recomputation and whatever else is done more than once lower it. On a machine that others
use, --threads 1 gives processor time. PPO with opt-1.3b has a critic and a reward model of opt-350m's size.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from matrix_peak import peak, products_of
from random_models import SHAPES, require_device, save_random_model, word_tokenizer
from versus_marks import STARTED, last_json_line

STEPS = {
    "sft": "step1_sft/main.py",
    "reward": "step2_reward/main.py",
    "dpo": "step2_reward/dpo.py",
    "ppo": "step3_ppo/main.py",
}


@dataclass(frozen=True)
class Size:
    """What runs with a model."""

    batch: int
    max_tokens: int
    num_steps: int
    answers: int
    """Of a PPO step."""
    prompt: int
    answer: int
    """Their longest, in tokens."""
    ppo_steps: int
    critic: str


SIZES = {
    "6m": Size(8, 256, 40, 16, 128, 128, 6, "6m"),
    "89m": Size(8, 256, 10, 16, 128, 128, 4, "89m"),
    "opt-1.3b": Size(32, 512, 24, 128, 256, 256, 4, "opt-350m"),
}


def main() -> None:
    """Prepare, run each step, print the table."""
    args = parse()
    require_device(args.device)
    args.folder = args.folder.resolve()
    size = SIZES[args.model]
    start = time.monotonic()
    prepare(args, size)
    rows_of_batch = size.batch * size.max_tokens // 2
    top, by_shape = peak(
        products_of(SHAPES[args.model], rows_of_batch), device=args.device, processor_time=args.threads == 1
    )
    found = {step: run(args, step, size) for step in args.steps}
    print(table(args, found, top, by_shape))
    print(f"\n{time.monotonic() - start:.0f} s in all")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Ends the program where a number leaves nothing to run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", choices=tuple(SIZES), default="6m", help="OPT's layout by size (default 6m).")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="Where to train (default cpu).")
    add("--steps", nargs="+", choices=tuple(STEPS), default=list(STEPS), help="These steps alone.")
    add("--folder", type=Path, default=Path("output/steps"), help="Models and text.")
    add("--threads", type=int, default=2, help="Threads on a CPU; 1: processor time (default 2).")
    add("--share", type=float, default=1.0, help="Share of the steps of each run, for a trial (default 1).")
    add("--flags", default="", help="More flags for every step, as one argument.")
    args = parser.parse_args(arguments)
    if args.threads < 1:
        parser.error(f"--threads {args.threads} is below 1.")
    if not 0 < args.share <= 1:
        parser.error(f"--share {args.share} is not above 0 and at most 1.")
    return args


def prepare(args: argparse.Namespace, size: Size) -> None:
    """Models of random weights and pairs of random words."""
    import torch

    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    tokenizer = word_tokenizer(SHAPES[args.model]["vocab_size"])
    for folder, name, scores in (
        (args.model, args.model, False),
        (f"{size.critic}-scores", size.critic, True),
    ):
        options = {"device": args.device, "dtype": dtype, "scores": scores}
        save_random_model(args.folder / folder, name, tokenizer, **options)
    chance = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(
            f"w{chance.randrange(1, len(tokenizer) - 2)}" for _ in range(chance.randint(least, most))
        )

    path = args.folder / f"pairs-{args.model}.jsonl"
    half, rows = size.max_tokens // 2, []
    for _ in range(max(size.batch * size.num_steps, size.answers * size.ppo_steps)):
        prompt = words(size.prompt // 4, size.prompt - 8)
        rows.append({"prompt": prompt, "chosen": words(half // 4, half), "rejected": words(half // 4, half)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(args: argparse.Namespace, step: str, size: Size) -> tuple[list[str], int]:
    """The command line of a step, and how many of its steps are not timed."""
    model, critic = str(args.folder / args.model), str(args.folder / f"{size.critic}-scores")
    shared = [
        "--data_path", str(args.folder / f"pairs-{args.model}.jsonl"),
        "--data_output_path", str(args.folder / "cache"), "--eval_fraction", "0", "--dtype", "bf16",
        "--data_split", {"sft": "1,0,0", "ppo": "0,0,1"}.get(step, "0,1,0"),
        "--chat_template", "none", *args.flags.split(),
    ]  # fmt: skip
    if step == "ppo":
        steps = max(3, round(size.ppo_steps * args.share))
        batch = str(size.answers)
        flags = [
            "--actor_model_name_or_path", model, "--critic_model_name_or_path", critic, "--enable_test_mode",
            "--test_stop_step", str(steps), "--max_prompt_seq_len", str(size.prompt), "--max_answer_seq_len",
            str(size.answer), "--per_device_generation_batch_size", batch, "--per_device_training_batch_size",
            str(min(size.answers, 16)), "--gradient_accumulation_steps", str(max(1, size.answers // 16)),
        ]  # fmt: skip
        return [STEPS[step], *flags, *shared], 1
    steps = max(4, round(size.num_steps * args.share))
    flags = [
        "--model_name_or_path", model, "--per_device_train_batch_size", str(size.batch), "--max_seq_len",
        str(size.max_tokens), "--max_train_samples", str(size.batch * steps),
    ]  # fmt: skip
    return [STEPS[step], *flags, *shared], max(1, steps // 4)


def run(args: argparse.Namespace, step: str, size: Size) -> dict[str, Any]:
    """The report of a step's process, or why there is none."""
    (program, *flags), left_out = command(args, step, size)
    wrapped = [
        sys.executable,
        str(ROOT / "benchmarks" / "versus_ours.py"),
        str(ROOT),
        str(left_out),
        program,
        *flags,
    ]
    threads = {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", STARTED: str(time.time())}
    environment = {**os.environ, **settings, **(threads if args.device == "cpu" else {})}
    ended = subprocess.run(wrapped, env=environment, capture_output=True, text=True, check=False)
    (args.folder / f"{step}-{args.model}.txt").write_text(ended.stdout + ended.stderr)
    try:
        return last_json_line(ended.stdout)
    except ValueError:
        return {"failed": f"it ended with {ended.returncode}: {(ended.stdout + ended.stderr)[-300:]}"}


def operations_a_second(
    step: str, report: dict[str, Any], model: dict[str, int], critic: dict[str, int]
) -> float:
    """Floating-point operations that the models need for what a run did in a second, its padding left out."""
    samples, tokens = report["samples_per_second"], report["tokens_per_second"]
    length = tokens / max(samples, 1e-9)
    if step != "ppo":
        rows = 1 if step == "sft" else 2
        return 3 * tokens * forward_operations(model, length / rows, has_head=step != "reward")
    answer = report["answer_tokens"]
    whole = length + answer
    actor = forward_operations(model, whole, has_head=True)
    critic_pass = forward_operations(critic, whole, has_head=False)
    # Sampling; reference and reward model; forward and backward of actor and critic, which analyse as well.
    return samples * whole * (actor + actor + critic_pass + 3 * actor + 3 * critic_pass)


def forward_operations(shape: dict[str, int], length: float, *, has_head: bool) -> float:
    """Of a token in a row of `length` tokens: the matrices, and attention to half of the row on average."""
    products = sum(p.operations for p in products_of(shape, 1) if has_head or p.name != "head")
    return products + 4 * shape["num_hidden_layers"] * shape["hidden_size"] * length / 2


def table(args: argparse.Namespace, found: dict[str, dict], top: float, by_shape: dict[str, float]) -> str:
    """Markdown."""
    size, clock = (
        SIZES[args.model],
        "processor time" if args.threads == 1 and args.device == "cpu" else "clock",
    )
    shapes = ", ".join(f"{name} {speed / 1e9:,.0f}" for name, speed in by_shape.items())
    lines = [
        f"{args.model}, {args.device}, batch {size.batch} of up to {size.max_tokens} tokens; "
        f"PPO {size.answers} answers, {size.prompt} + {size.answer} tokens; {clock}",
        f"matrix products, GFLOP/s: {shapes}; together {top / 1e9:,.0f}",
        "",
        "| step | samples/s | tokens/s | share of the matrix peak | peak memory, MiB | seconds by phase |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for step, report in found.items():
        if "failed" in report:
            lines.append(f"| {step} | {report['failed']} | | | | |")
            continue
        scale = report["seconds"] / report["cpu_seconds"] if clock == "processor time" else 1.0
        answer = report.get("answer_tokens", size.answer)
        speed = scale * operations_a_second(
            step, {**report, "answer_tokens": answer}, SHAPES[args.model], SHAPES[size.critic]
        )
        tokens = report["tokens_per_second"] + (answer * report["samples_per_second"] if step == "ppo" else 0)
        phases = ", ".join(
            f"{name.removeprefix('seconds_')} {value:.3f}" for name, value in report["phases"].items()
        )
        memory = report.get("device_peak_mib") or report["training_peak_mib"]
        lines.append(
            f"| {step} | {report['samples_per_second'] * scale:,.1f} | {tokens * scale:,.0f} "
            f"| {speed / top:.0%} | {memory:,.0f} | {phases} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
