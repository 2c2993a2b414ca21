"""Planned against measured memory and time of whole runs, from random weights and random text.

python benchmarks/planner.py --output benchmarks/results/planner.md
python benchmarks/planner.py --device cuda

Each run is a program of a step as it is, in processes of its own, after `scripts/plan.py` has measured the
device for its flags on as many ranks. Programs whose memory is not that of the process, those on a GPU and
`scripts/plan.py`, are forked from a process that has imported the libraries, which takes longer than they
do. Both numbers are those of the run's plan.json: what it predicted before its models were
loaded, and what it measured. Rows are what a plan is for: as long as they may be, with a label for nearly
every token, and not packed. On a CPU every process has one thread, and seconds are processor time, which
other programs move less than the clock; waiting for other ranks is not among them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

PROGRAMS = {
    "sft": "step1_sft/main.py",
    "reward": "step2_reward/main.py",
    "dpo": "step2_reward/dpo.py",
    "rlhf": "step3_ppo/main.py",
}
SIZES = {
    "cpu": ("6m", "27m", "89m", "llama-13m", "llama-58m", "llama-50m-tied"),
    "cuda": ("opt-350m", "opt-1.3b"),
}
WITHIN = {"cpu": {"memory": 0.15, "seconds": 0.25}, "cuda": {"memory": 0.10, "seconds": 0.25}}
"""How far a prediction may be off."""
LIMIT = {"cpu": 800, "cuda": 150}
"""Seconds that one program may take."""


@dataclass(frozen=True)
class Case:
    """A run."""

    step: str
    size: str
    flags: str = ""
    ranks: int = 1
    rows: int = 4
    """Rows (pairs) per rank and micro-batch; of PPO half of the answers."""
    length: int = 128
    """Tokens per row, of PPO of prompt and answer together."""
    answer: int = 0
    """Tokens of an answer of PPO; 0 for half of the row."""
    is_held_out: bool = False
    """Whether the planner was left alone after this run."""

    def __str__(self) -> str:
        held_out = "held out " * self.is_held_out
        shape = f"{self.rows} x {self.length}" + f" {self.answer}" * (self.answer > 0)
        return f"{held_out}{self.step} {self.size} {self.ranks} {shape} {self.flags}"

    @property
    def folder(self) -> str:
        """A name for its files."""
        return "".join(c if c.isalnum() else "_" for c in str(self))

    @property
    def prompt(self) -> int:
        """Words of a prompt, some less than tokens that there is room for."""
        return self.length - (self.answer or self.length // 2) - 4 if self.step == "rlhf" else 4

    @property
    def kinds(self) -> tuple[bool, ...]:
        """Of its models, whether they have scores."""
        return (False, True) if self.step == "rlhf" else (False,)

    @property
    def text(self) -> str:
        """The name of its data."""
        return f"pairs-{self.length}-{self.prompt}.jsonl"

    def models(self, folder: Path) -> list[str]:
        """The flags that name its models."""
        model = str(folder / self.size)
        if self.step != "rlhf":
            return [f"--model_name_or_path={model}"]
        return [f"--actor_model_name_or_path={model}", f"--critic_model_name_or_path={model}-scores"]


BY_PROCESSOR_TIME = """
import os, runpy, sys, time
time.perf_counter = time.process_time
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a program, whose path and arguments follow, with processor time in place of the clock."""

LORA = "--lora_dim 8 --only_optimize_lora"
BOTH = "--actor_zero_stage {0} --critic_zero_stage {0}"
BOTH_LORA = "--actor_lora_dim 8 --critic_lora_dim 8 --only_optimize_lora"


def cases(device: str) -> Iterator[Case]:
    """What is run: every way to shard one size, and some of them with the others."""
    if device == "cuda":
        for step, size, flags in (
            *(("sft", "opt-350m", flags) for flags in ("", "--zero_stage 2", "--zero_stage 3", LORA)),
            ("sft", "opt-1.3b", "--gradient_checkpointing"),
            ("reward", "opt-350m", ""),
            ("rlhf", "opt-350m", ""),
            ("sft", "opt-1.3b", "--zero_stage 2 --offload --gradient_checkpointing"),  # compiles first
        ):
            yield Case(step, size, flags, rows=16, length=512)
        return
    small, middle, large = SIZES["cpu"][:3]
    for ranks in (1, 2):
        for stage in range(4):
            yield Case("sft", middle, f"--zero_stage {stage}", ranks)
    for stage in (1, 2, 3):
        yield Case("sft", middle, f"--zero_stage {stage} --offload")
    yield Case("sft", middle, "--zero_stage 2 --offload", 2)
    yield Case("sft", middle, "--tensor_parallel_size 2", 2)
    for flags in (LORA, "--gradient_checkpointing", "--dtype bf16", "--gradient_accumulation_steps 2"):
        yield Case("sft", middle, flags)
    for size in (small, large):
        for flags in ("--zero_stage 0", "--zero_stage 2", "--zero_stage 3", LORA):
            yield Case("sft", size, flags)
    yield Case("reward", small)
    yield Case("reward", middle)
    yield Case("rlhf", small)
    yield Case("rlhf", middle)
    yield Case("rlhf", middle, BOTH.format(2), 2)
    yield Case("rlhf", middle, BOTH.format(3), 2)
    yield Case("rlhf", middle, BOTH_LORA)
    yield from held_out()


def held_out() -> Iterator[Case]:
    """Runs that no number of the planner was chosen by."""
    small, wide, deep = SIZES["cpu"][3:]
    for step, size, flags, ranks, rows, length, answer in (
        ("sft", small, "", 1, 8, 192, 0),
        ("sft", small, "--zero_stage 3", 2, 6, 96, 0),
        ("sft", wide, "", 1, 4, 128, 0),
        ("sft", wide, "--gradient_checkpointing", 1, 8, 256, 0),
        ("sft", wide, "--dtype bf16", 1, 3, 160, 0),
        ("sft", wide, "--zero_stage 1 --offload", 1, 4, 96, 0),
        ("sft", deep, "--zero_stage 2", 1, 5, 160, 0),
        ("sft", deep, "--gradient_accumulation_steps 4", 1, 2, 160, 0),
        ("sft", deep, "--lora_dim 16 --only_optimize_lora", 1, 6, 160, 0),
        ("reward", wide, "", 1, 2, 192, 0),
        ("reward", deep, "--zero_stage 3", 1, 3, 128, 0),
        ("dpo", small, "", 1, 4, 160, 0),
        ("dpo", deep, "--lora_dim 16 --only_optimize_lora", 1, 2, 128, 0),
        ("rlhf", small, "", 1, 4, 128, 32),
        ("rlhf", deep, "--enable_ema", 1, 2, 96, 64),
        ("rlhf", small, BOTH.format(2), 2, 2, 160, 96),
        ("rlhf", small, BOTH.format(3), 2, 4, 128, 48),
        ("rlhf", small, BOTH.format(3), 1, 2, 160, 96),
        ("rlhf", small, f"{BOTH.format(3)} {BOTH_LORA}", 2, 3, 128, 48),
        ("rlhf", deep, BOTH_LORA, 1, 3, 128, 80),
        ("rlhf", wide, "--dtype bf16 --actor_gradient_checkpointing", 1, 4, 192, 64),
    ):
        yield Case(step, size, flags, ranks, rows, length, answer, is_held_out=True)


def flags_of(case: Case, folder: Path, device: str) -> list[str]:
    """The flags of a run's step."""
    rows, length = case.rows, case.length
    text = str(folder / case.text)
    split = {"sft": "1,0,0", "rlhf": "0,0,1"}.get(case.step, "0,1,0")
    found = [
        *case.models(folder), "--data_path", text, "--chat_template", "none",
        "--eval_fraction", "0", "--packing", "off", "--data_output_path", str(folder / "cache"),
        "--output_dir", str(folder / case.folder), "--data_split", split,
    ]  # fmt: skip
    if case.step == "rlhf":
        answer = case.answer or length // 2
        found += [
            "--enable_test_mode", "--test_stop_step", "4", "--max_prompt_seq_len", str(length - answer),
            "--max_answer_seq_len", str(answer), "--per_device_generation_batch_size", str(2 * rows),
            "--per_device_training_batch_size", str(2 * rows),
        ]  # fmt: skip
    else:
        steps = 5 if device == "cpu" else 12
        parts = int(case.flags.split("accumulation_steps ")[-1][0]) if "accumulation" in case.flags else 1
        found += [
            "--per_device_train_batch_size", str(rows), "--max_seq_len", str(length),
            "--max_train_samples", str(steps * rows * case.ranks * parts),
        ]  # fmt: skip
    dtype = ["--dtype", "bf16" if device == "cuda" else "fp32"] if "--dtype" not in case.flags else []
    return [*found, *dtype, *case.flags.split()]


def prepare(wanted: Sequence[Case], folder: Path, device: str) -> None:
    """Models of random weights, and pairs of random words, for these cases."""
    import torch
    from random_models import SHAPES, save_random_model, word_tokenizer

    for size, scores in sorted({(case.size, scores) for case in wanted for scores in case.kinds}):
        tokenizer, name = word_tokenizer(SHAPES[size]["vocab_size"]), f"{size}{'-scores' * scores}"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        save_random_model(folder / name, size, tokenizer, device=device, dtype=dtype, scores=scores)

    for case in {case.text: case for case in wanted}.values():
        chance, answer = random.Random(0), case.length - case.prompt - 4
        sizes = {"prompt": case.prompt, "chosen": answer, "rejected": answer}
        rows = [{name: words(number, chance) for name, number in sizes.items()} for _ in range(400)]
        (folder / case.text).write_text("".join(json.dumps(row) + "\n" for row in rows))


def words(number: int, chance: random.Random) -> str:
    """So many random words."""
    return " ".join(f"w{chance.randrange(1, 4000)}" for _ in range(number))


def run(case: Case, folder: Path, device: str, *, with_seconds: bool = True) -> dict[str, Any]:
    """The plan.json of a run, or why there is none or what it lacks; `with_seconds` the device is measured
    before it."""
    flags, written = flags_of(case, folder, device), folder / case.folder / "plan.json"
    log = folder / f"{case.folder}.txt"
    written.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    planning = ["scripts/plan.py", case.step, *flags]
    for words in [planning] * with_seconds + [[PROGRAMS[case.step], *flags, "--overwrite_output_dir"]]:
        with closing(socket.socket()) as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        ranks = case.ranks
        sizes: dict[str, Any] = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), ranks)
        sizes |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        of_ranks = [{**sizes, "RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {} for rank in range(ranks)]
        children = [forked(words, log, device, environment) for environment in of_ranks]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes) and (words[0] != "scripts/plan.py" or not log.read_text().count("plan:")):
            last = log.read_text().strip().splitlines()[-1:]
            return {"failed": f"{words[0]} ended with {codes}: {' '.join(last)} ({log.name})"}
    return written_plan(case, folder) or {"failed": f"no plan, or nothing measured: see {log.name}"}


def written_plan(case: Case, folder: Path) -> dict[str, Any] | None:
    """The plan.json that a run left; None where there is none, or the run did not end."""
    with suppress(OSError):
        plan: dict[str, Any] = json.loads((folder / case.folder / "plan.json").read_text())
        return plan if "measured" in plan else None
    return None


def forked(words: Sequence[str], log: Path, device: str, environment: dict[str, Any]) -> int:
    """A child of this process, which has imported the libraries, with a program in it. -> its id."""
    child = os.fork()
    if child:
        return child
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(LIMIT[device])
    try:
        with log.open("a") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        os.environ.update({name: str(value) for name, value in environment.items()})
        if device == "cpu":
            time.perf_counter = time.process_time
        program = ROOT / words[0]
        if device == "cuda" and cannot_start_cuda():
            os.execv(sys.executable, [sys.executable, str(program), *words[1:]])
        if device == "cpu" and words[0] != "scripts/plan.py":
            os.execv(sys.executable, [sys.executable, "-c", BY_PROCESSOR_TIME, str(program), *words[1:]])
        sys.argv = [str(program), *words[1:]]
        sys.path.insert(0, str(program.parent))
        runpy.run_path(str(program), run_name="__main__")
        os._exit(0)
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else int(bool(end.code)))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def cannot_start_cuda() -> bool:
    """Whether this process was forked from one that had asked CUDA for something."""
    import torch

    return torch.cuda._is_in_bad_fork()


def error(predicted: float, measured: float) -> float:
    """How far a prediction is above what was measured, as a share of that."""
    return predicted / measured - 1 if measured else 0.0


def row(case: Case, plan: dict[str, Any], device: str) -> tuple[str, list[str]]:
    """A row of the table, and what is further off than it may be."""
    if "failed" in plan:
        reason = plan["failed"].replace("|", "/")
        return f"| | {case.step} | {case.size} | {case.ranks} | | `{case.flags}` | {reason} |", [str(case)]
    measured, within, off = plan["measured"], WITHIN[device], []
    memory = error(plan["device_peak"], measured["device_peak"])
    worst = max(plan["phases"], key=lambda name: plan["phases"][name]["device"])
    length = f"{case.length - case.answer} + {case.answer}" if case.answer else str(case.length)
    cells = [
        *("held out" * case.is_held_out, case.step, case.size, str(case.ranks), f"{case.rows} x {length}"),
        *(f"`{case.flags}`" if case.flags else "", worst),
        *(f"{plan['device_peak'] / 1e6:,.0f}", f"{measured['device_peak'] / 1e6:,.0f}", f"{memory:+.0%}"),
    ]
    if abs(memory) > within["memory"]:
        off.append(f"memory of {case}: {memory:+.0%}")
    predicted, found = plan["seconds"] or {}, measured.get("seconds", {})
    phases = []
    for name, seconds in predicted.items():
        if found.get(name):
            phases.append(f"{name} {seconds:.3g} / {found[name]:.3g}")
    if predicted:
        whole = sum(found.get(name, 0.0) for name in predicted)
        seconds = error(sum(predicted.values()), whole)
        cells += [f"{sum(predicted.values()):.3g}", f"{whole:.3g}", f"{seconds:+.0%}", "; ".join(phases)]
        if abs(seconds) > within["seconds"]:
            off.append(f"seconds of {case}: {seconds:+.0%}")
    else:
        cells += [""] * 4
    return f"| {' | '.join(cells)} |", off


def report(found: dict[Case, dict[str, Any]], device: str, minutes: float) -> str:
    """Markdown."""
    import torch
    import versus_report

    rows, off = [], []
    for case, plan in found.items():
        line, more = row(case, plan, device)
        rows.append(line)
        off += more
    clock = "processor time of one thread" if device == "cpu" else "by the clock"
    beside = [plan["measured"].get("beside_tensors", 0) for plan in found.values() if "measured" in plan]
    card = f" {card_name()}; {max(beside, default=0) / 1e6:,.0f} MB of it beside the allocator's;"
    card = card if device == "cuda" else ""
    within = WITHIN[device]
    return "\n".join(
        [
            f"# Planned against measured memory and time, {device}",
            "",
            f"`python benchmarks/planner.py --device {device}`;{card} {versus_report.machine()}; torch "
            f"{torch.__version__}; {minutes:.0f} minutes in all. Random weights. Predicted "
            "is what a run printed before it loaded its models, measured what it found at its end: memory in "
            "MB, on a CPU the largest resident memory of a rank less what it held before its models; seconds "
            f"are of an optimiser step (PPO: a PPO step), {clock}.",
            "",
            "| | step | model | ranks | rows x tokens | flags | worst phase | MB planned | measured | error "
            "| s a step planned | measured | error | by phase, planned / measured |",
            "|---|---|---|---:|---|---|---|---:|---:|---:|---:|---:|---:|---|",
            *rows,
            "",
            f"Off by more than {within['memory']:.0%} in memory or {within['seconds']:.0%} in seconds: "
            f"{'; '.join(off) or 'none'}.",
            "",
        ]
    )


def card_name() -> str:
    """The GPU's name, from a program of its own: a process that has asked CUDA cannot be forked for a run."""
    words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    with suppress(OSError):
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    return "an unknown GPU"


def import_libraries(folder: Path) -> None:
    """What every run imports, once, with the environment that it is to see."""
    # Imports ask torch.cuda.is_available(), which is to leave CUDA alone, for children.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    from torch.utils.cpp_extension import get_default_build_root

    machine = folder / "machine"  # so that times stay out of the user's own folder
    machine.mkdir(parents=True, exist_ok=True)
    if not (machine / "torch_extensions").exists():
        (machine / "torch_extensions").symlink_to(get_default_build_root())
    os.environ.update(
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        XDG_CACHE_HOME=str(machine),
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    )
    for name in (
        "dschat.supervised.run",
        "dschat.rlhf.train",
        "dschat.rlhf.rlhf_engine",
        "dschat.planning.plan",
    ):
        importlib.import_module(name)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--device", choices=tuple(SIZES), default="cpu", help="Where to train (default cpu).")
    add("--folder", type=Path, default=Path("output/planner"), help="Models, text and runs.")
    add("--output", type=Path, help="Markdown file to write beside what is printed.")
    add(
        "--only",
        nargs="*",
        default=[""],
        help="Cases that contain one of these texts, as 'sft 6m'; | is their end.",
    )
    add(
        "--memory_only", action="store_true", help="Do not measure the device, which takes longer than a run."
    )
    add("--missing", action="store_true", help="Only cases of which --folder has no finished run.")
    add("--report", action="store_true", help="Run nothing: the table of the runs that are in --folder.")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every case, print the table."""
    args = parse(arguments)
    folder, start, found = args.folder.resolve(), time.monotonic(), {}
    wanted = [case for case in cases(args.device) if any(text in f"{case}|" for text in args.only)]
    if args.report or args.missing:
        for case in wanted:
            if plan := written_plan(case, folder):
                found[case] = plan
        wanted = [] if args.report else [case for case in wanted if case not in found]
    if wanted:
        import_libraries(folder)
        if not (child := os.fork()):  # so that models that were written are no memory of the runs
            prepare(wanted, folder, args.device)
            os._exit(0)
        os.waitpid(child, 0)
    text = report(found, args.device, 0.0)
    for case in wanted:
        found[case] = run(case, folder, args.device, with_seconds=not args.memory_only)
        print(row(case, found[case], args.device)[0], file=sys.stderr, flush=True)
        text = report(found, args.device, (time.monotonic() - start) / 60)
        if args.output:  # after each, so that what was measured stays if the next is killed
            args.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
