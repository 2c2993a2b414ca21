"""Whether a GPU computes what a CPU does: short runs of every step in fp32, and how their metrics differ.

CUDA_VISIBLE_DEVICES= python benchmarks/gpu_numbers.py --record cpu.json
python benchmarks/gpu_numbers.py --compare cpu.json

Models have random weights and two layers, text is random words. Runs are forked from a process that has
imported the libraries, and go side by side (--jobs). Each line is a run, with the largest difference of a
metric of any step, relative to its size where that is above 1. Runs that were stopped and resumed are
compared with themselves, to the last bit. Exit code 1 where a run fails or a difference is above --tolerance.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from planner import forked, import_libraries
from steps import STEPS

FAMILIES = ("llama", "opt", "qwen3", "gpt2", "gpt_neox")
UNEQUAL = ("seconds", "per_second", "peak_share", "memory", "time", "rollout_logprob_difference")
"""Parts of the names of metrics that are not compared."""
TRAINED = "--per_device_train_batch_size 4 --max_seq_len 64 --max_train_samples 24 --learning_rate 1e-3"
PPO = (
    "--max_prompt_seq_len 32 --max_answer_seq_len 40 --per_device_generation_batch_size 8 --eval_interval 0 "
    "--per_device_training_batch_size 4 --gradient_accumulation_steps 2 --enable_test_mode --test_stop_step 3"
)
LORA = "--lora_dim 4 --only_optimize_lora"


DIES_WITH_A_CHECKPOINT = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
from dschat.checkpoints.checkpoint import Checkpoints
save = Checkpoints.save
def save_and_die(*args, **options):
    save(*args, **options)
    os._exit(9)
Checkpoints.save = save_and_die
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a program, whose path and arguments follow, up to its first checkpoint."""


@dataclass(frozen=True)
class Case:
    """A run."""

    step: str
    family: str
    flags: str = ""
    like: str = ""
    """The name of the run that it must equal, if that is not its own on a CPU."""
    stops_at: int = 0
    """The step after which it is stopped, to be resumed."""

    @property
    def name(self) -> str:
        """As the table has it."""
        words = (self.step, self.family, self.flags, "resumed" if self.stops_at else "")
        return " ".join(filter(None, words))

    @property
    def folder(self) -> str:
        """A name for its files."""
        return "".join(c if c.isalnum() else "_" for c in self.name)


def cases() -> list[Case]:
    """Every step and family, then ways to run one of them."""
    found = [Case(step, family) for step in STEPS for family in FAMILIES]
    found += [Case("sft", "llama", f"--zero_stage {stage}", like="sft llama") for stage in (1, 2, 3)]
    found += [
        Case("ppo", "llama", f"--actor_zero_stage {stage} --critic_zero_stage {stage}", like="ppo llama")
        for stage in (2, 3)
    ]
    found += [
        Case("ppo", family, f"--rollout_backend {backend}", like=f"ppo {family}")
        for family, backend in (("llama", "hf"), ("opt", "hf"), ("llama", "continuous"))
    ]
    found += [Case("sft", "opt", f"--packing {packing}", like="sft opt") for packing in ("on", "off")]
    found += [
        Case("sft", "llama", LORA),
        Case("sft", "llama", "--gradient_checkpointing", like="sft llama"),
        Case("reward", "llama", "--packing on", like="reward llama"),
        Case("ppo", "opt", "--enable_ema --ppo_epochs 2"),
        Case("ppo", "llama", "--enable_hybrid_engine", like="ppo llama"),
        Case("sft", "opt", stops_at=3, like="sft opt"),
        Case("ppo", "opt", stops_at=2, like="ppo opt"),
    ]
    return found


def main() -> None:
    """Run, then keep or compare."""
    args = parse()
    folder = args.folder.resolve()
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    (folder / "dies.py").write_text(DIES_WITH_A_CHECKPOINT)
    import_libraries(folder)
    prepare(folder)
    chosen = [case for case in cases() if args.only in case.name]
    recorded = json.loads(args.compare.read_text()) if args.compare else None
    found: dict[str, Any] = {}
    worst = 0.0
    print("| run in fp32 | compared with | largest difference | of |\n| --- | --- | ---: | --- |")
    for case in run_all(chosen, folder, args.jobs):
        found[case.name] = result_of(case, folder)
        if recorded is not None and not case.stops_at:
            worst = max(worst, compared(case, found, recorded))
    for case in chosen:
        if recorded is not None and case.stops_at:
            worst = max(worst, compared(case, found, recorded))
    if args.record:
        args.record.write_text(json.dumps(found) + "\n")
        failed = [f"{name}: {result}" for name, result in found.items() if isinstance(result, str)]
        sys.exit("\n".join(failed) or 0)
    sys.exit(int(worst > args.tolerance))


def compared(case: Case, found: dict[str, Any], recorded: dict[str, Any]) -> float:
    """Print a line; the largest difference, infinite where a run failed or is not resumed to the bit."""
    result = found[case.name]
    if isinstance(result, str):
        print(f"| {case.name} | | failed | {result} |", flush=True)
        return math.inf
    itself = case.stops_at > 0 and not isinstance(found.get(case.like, ""), str)
    other = found[case.like] if itself else recorded.get(case.like or case.name)
    difference, metric = largest_difference(result, other)
    beside = "itself, not stopped" if itself else "a CPU"
    print(f"| {case.name} | {beside} | {difference:.1e} | {metric} |", flush=True)
    return math.inf if itself and difference else difference


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add, kind = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--record", type=Path, help="Write the metrics of these runs to this file.")
    kind.add_argument("--compare", type=Path, help="Compare these runs with those of this file.")
    add("--folder", type=Path, default=Path("output/gpu_numbers"), help="Models, text and runs.")
    add("--jobs", type=int, default=2, help="Runs at once (default 2).")
    add("--only", default="", help="Runs whose names contain this alone.")
    add("--tolerance", type=float, default=2e-3, help="Largest difference of a metric (default 2e-3).")
    return parser.parse_args()


def prepare(folder: Path) -> None:
    """Models, reward models and pairs."""
    import torch
    from families import config_of
    from random_models import word_tokenizer
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from dschat.models.config import read_config

    tokenizer: Any = word_tokenizer(512)
    for family in FAMILIES:
        torch.manual_seed(0)
        config_of(family, tokenizer, 64, 2).save_pretrained(folder / family)
        config = read_config(str(folder / family), dropout=0.0)
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder / family)
        config.num_labels = 1
        scores: Any = AutoModelForSequenceClassification.from_config(config)
        scores.save_pretrained(folder / f"{family}-scores")
        for path in (folder / family, folder / f"{family}-scores"):
            tokenizer.save_pretrained(path)
    chance = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(f"w{chance.randrange(1, 500)}" for _ in range(chance.randint(least, most)))

    rows = [{"prompt": words(4, 24), "chosen": words(4, 30), "rejected": words(4, 30)} for _ in range(64)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_all(chosen: list[Case], folder: Path, jobs: int) -> Iterator[Case]:
    """Run the programs of all cases, so many at once; yields each case when it has ended."""
    waiting = [(case, programs_of(case, folder)) for case in reversed(chosen)]
    running: dict[int, tuple[Case, list[list[str]]]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            case, programs = waiting.pop()
            log = folder / "runs" / f"{case.folder}.txt"
            running[forked(programs[0], log, "cuda", {})] = case, programs[1:]
        child, _ = os.wait()
        case, programs = running.pop(child)
        if programs:
            waiting.append((case, programs))
        else:
            yield case


def programs_of(case: Case, folder: Path) -> list[list[str]]:
    """The programs of a run with their flags, one after the other."""
    model = str(folder / case.family)
    if case.step == "ppo":
        flags = f"--actor_model_name_or_path {model} --critic_model_name_or_path {model}-scores {PPO}"
        split = "0,0,1"
    else:
        flags = f"--model_name_or_path {model} {TRAINED}"
        split = "1,0,0" if case.step == "sft" else "0,1,0"
    shared = (
        f"--data_path {folder / 'pairs.jsonl'} --data_output_path {folder / 'cache'} --data_split {split} "
        "--eval_fraction 0 --seed 5 --dtype fp32 --chat_template none "
        f"--output_dir {folder / 'runs' / case.folder} --save_interval {case.stops_at}"
    )
    flags = f"{flags} {case.flags} {shared}"
    command = [str(ROOT / STEPS[case.step]), *flags.split()]
    if not case.stops_at:
        return [[*command, "--overwrite_output_dir"]]
    dying = [str(folder / "dies.py"), *command, "--overwrite_output_dir"]
    return [dying, [*command, "--resume_from_checkpoint", "latest"]]


def result_of(case: Case, folder: Path) -> list[dict[str, float]] | str:
    """The metrics of a run's steps, or what it said last where it did not end."""
    output = folder / "runs" / case.folder
    log = output.with_suffix(".txt").read_text()
    if not (output / "manifest.json").exists() and not (output / "actor" / "manifest.json").exists():
        return repr(log[-300:])
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def largest_difference(result: list[dict[str, float]], other: Any) -> tuple[float, str]:
    """Of a metric of any step, relative where that is above 1; and which metric has it."""
    if not isinstance(other, list) or len(other) != len(result):
        return math.inf, "no run to compare with, or not as many steps"
    worst = (0.0, "")
    for ours, theirs in zip(result, other, strict=True):
        for name in ours.keys() & theirs.keys():
            value, expected = ours[name], theirs[name]
            if isinstance(value, int | float) and not any(part in name for part in UNEQUAL):
                difference = abs(value - expected) / max(1.0, abs(expected))
                worst = max(worst, (difference, f"{name} at {ours.get('step')}"))
    return worst


if __name__ == "__main__":
    main()
