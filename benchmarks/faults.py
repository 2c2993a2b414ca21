"""Kill runs at random moments, resume them, and compare with runs that nothing happened to, bit by bit.

python benchmarks/faults.py --kills 60
One table at the end: kills by step and by what was going on, runs that ended with other weights or metrics
(there must be none), and optimiser steps done twice. All of it is written to OUTPUT/faults.json as well.

Half of the kills on two ranks hit one rank alone; the launcher and the other rank have to notice. What a
process was doing is read from a stack that it writes on a signal, just before it is killed.
"""

import argparse
import faulthandler
import hashlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.peers import is_gone

SFT, REWARD, DPO, PPO = (
    "step1_sft/main.py",
    "step2_reward/main.py",
    "step2_reward/dpo.py",
    "step3_ppo/main.py",
)

SUPERVISED = (
    "--max_seq_len=64 --per_device_train_batch_size=8 --gradient_accumulation_steps=2 --num_train_epochs=2 "
    "--eval_interval=4 --dropout=0.1 --save_interval=3 --learning_rate=1e-3"
)
RLHF = (
    "--max_prompt_seq_len=40 --max_answer_seq_len=16 --per_device_generation_batch_size=8 "
    "--generation_batches=2 --per_device_training_batch_size=4 --gradient_accumulation_steps=2 "
    "--ppo_epochs=2 --num_warmup_steps=2 --actor_learning_rate=1e-4 --critic_learning_rate=3e-4 "
    "--kl_target=0.5 --score_normalization=running --enable_ema --save_interval=3 --eval_interval=3"
)
UPDATES_PER_PPO_STEP = 4
"""Optimiser steps of a PPO step with these flags."""


@dataclass(frozen=True)
class Case:
    """A program with its flags, on so many ranks."""

    name: str
    program: str
    flags: str
    ranks: int = 1


CASES = (
    Case("sft zero 0 fp32", SFT, f"{SUPERVISED} --dtype=fp32"),
    Case("sft zero 2 bf16 LoRA", SFT, f"{SUPERVISED} --zero_stage=2 --lora_dim=4", ranks=2),
    Case("reward zero 0 bf16", REWARD, SUPERVISED),
    Case("reward zero 3 fp32", REWARD, f"{SUPERVISED} --zero_stage=3 --dtype=fp32", ranks=2),
    Case("dpo zero 1 bf16", DPO, f"{SUPERVISED} --zero_stage=1"),
    Case("ppo zero 0 fp32", PPO, f"{RLHF} --dtype=fp32"),
    Case("ppo zero 2+3 bf16", PPO, f"{RLHF} --actor_zero_stage=2 --critic_zero_stage=3", ranks=2),
    Case("ppo zero 3 LoRA fp32", PPO, f"{RLHF} --dtype=fp32 --actor_zero_stage=3 --actor_lora_dim=4"),
)

PHASES = (
    ("saving", ("progress.py", "save_checkpoint")),
    ("exporting", ("export_model",)),
    ("evaluating", ("evaluation.py", "_evaluated", "reference.py")),
    ("generating", ("rollout.py",)),
    ("judging", ("judging.py",)),
    ("training", ("train_on", "train_rlhf", "train_epochs", "training.py")),
    (
        "loading",
        ("factory.py", "rlhf_engine.py", "engines.py", "manifest.py", "preparation.py"),
    ),
)
"""What is going on, by words of the stack; the first that fits counts."""

CHANGING = ("seconds", "tokens_per_second", "peak_memory_gib")
"""Figures that differ between equal runs."""


def main() -> int:
    """Prepare, run every case without faults, then the kills. The exit code is 1 where anything differs."""
    args = parse()
    prepare(args.output_dir)
    references = {}
    for case in CASES:
        start = time.monotonic()
        folder = args.output_dir / "reference" / case.name.replace(" ", "_")
        shutil.rmtree(folder, ignore_errors=True)
        code, log = finish(start_run(case, folder, args.output_dir), folder)
        if code != 0:
            sys.exit(f"{case.name} ended with {code} though nothing happened to it:\n{log[-3000:]}")
        references[case.name] = (outcome(folder), time.monotonic() - start)
        print(f"{case.name}: {references[case.name][1]:.1f} s without a fault", flush=True)
    rng = random.Random(args.seed)
    trials = [(number, CASES[number % len(CASES)], rng.random()) for number in range(args.kills)]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda trial: run_trial(*trial, references, args), trials))
    (args.output_dir / "faults.json").write_text(json.dumps(results, indent=2) + "\n")
    return report(results)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--kills", type=int, default=60, help="SIGKILLs, dealt to the cases in turn (default 60).")
    add("--jobs", type=int, default=2, help="Runs at one time (default 2).")
    add("--seed", type=int, default=0, help="Decides the moments, as far as the clock lets it (default 0).")
    add("--output-dir", type=Path, default=Path("output/faults"), help="Folder of all runs.")
    return parser.parse_args()


def prepare(folder: Path) -> None:
    """Data, a base model, and the models that steps 2 and 3 start from."""
    folder.mkdir(parents=True, exist_ok=True)
    demo = folder / "demo"
    if not demo.is_dir():
        sizes = ["--num-train", "420", "--num-test", "30"]
        subprocess.run([sys.executable, ROOT / "scripts/demo_task.py", demo, *sizes], check=True)
    for name, program, base in (("sft", SFT, demo / "base_model"), ("reward", REWARD, folder / "sft")):
        if not (folder / name / "summary.json").is_file():
            flags = [f"--model_name_or_path={base}", f"--output_dir={folder / name}", "--max_seq_len=64"]
            shared = [
                f"--data_path={demo / 'data'}",
                f"--data_output_path={folder / 'cache'}",
                "--dtype=fp32",
            ]
            subprocess.run([sys.executable, ROOT / program, *flags, *shared], check=True)


def command(case: Case, output: Path, folder: Path, *more: str) -> list[str]:
    """How a case is started, below this file, which lets its stack be asked for."""
    base = folder / ("demo/base_model" if case.program == SFT else "sft")
    flags = [f"--model_name_or_path={base}"]
    if case.program == PPO:
        models = {"actor": folder / "sft", "critic": folder / "reward"}
        flags = [f"--{name}_model_name_or_path={path}" for name, path in models.items()]
    flags += [f"--data_path={folder / 'demo/data'}", f"--data_output_path={folder / 'cache'}"]
    flags += ["--data_split=1,1,1", f"--output_dir={output}", *case.flags.split(), *more]
    launcher = [sys.executable]
    if case.ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={case.ranks}"]
    return [*launcher, str(Path(__file__).resolve()), "--child", str(stacks(output)), case.program, *flags]


def stacks(output: Path) -> Path:
    """Where the processes of a run write what they are doing, one file a process."""
    return output.parent / f"{output.name}.stacks"


def start_run(case: Case, output: Path, folder: Path, *more: str) -> subprocess.Popen:
    """Start a case, its console in a file beside its output folder."""
    shutil.rmtree(stacks(output), ignore_errors=True)
    stacks(output).mkdir(parents=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with output.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            command(case, output, folder, *more),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )


def finish(process: subprocess.Popen, output: Path) -> tuple[int, str]:
    """The exit code of a run and its console."""
    code = process.wait(timeout=900)
    return code, output.with_suffix(".log").read_text(errors="replace")


def child(folder: str, program: str, flags: list[str]) -> None:
    """Run a step's program in this process, which writes its stack on SIGUSR2."""
    with Path(folder, f"{os.environ.get('RANK', '0')}.{os.getpid()}").open("w") as stack:
        faulthandler.register(signal.SIGUSR2, file=stack, all_threads=False)
        sys.argv = [str(ROOT / program), *flags]
        runpy.run_path(sys.argv[0], run_name="__main__")


def run_trial(
    number: int, case: Case, moment: float, references: dict[str, tuple[Any, float]], args: argparse.Namespace
) -> dict[str, Any]:
    """Start a case, kill it at a moment, resume it to the end, compare."""
    output = args.output_dir / "trials" / f"{number:03d}"
    expected, seconds = references[case.name]
    rng = random.Random(moment)
    while True:
        shutil.rmtree(output, ignore_errors=True)
        output.with_suffix(".log").unlink(missing_ok=True)
        process = start_run(case, output, args.output_dir)
        aims_at_saving = rng.random() < 0.25
        wait_for(process, output, rng, seconds, aims_at_saving=aims_at_saving)
        phase, alone = kill(process, output, rng)
        if phase is not None:
            break  # otherwise it had finished: again
    before = last_step(output)
    updates = before * (UPDATES_PER_PPO_STEP if case.program == PPO else 1)
    code, log = finish(start_run(case, output, args.output_dir, "--resume_from_checkpoint=latest"), output)
    found = outcome(output) if code == 0 else None
    result = {
        "trial": number,
        "case": case.name,
        "phase": phase,
        "one rank alone": alone,
        "step when killed": before,
        "steps lost": max(0, updates - resumed_step(log)),
        "exit code": code,
        "equal": found == expected,
    }
    if result["equal"]:
        shutil.rmtree(output)
    else:
        result |= {"differs in": differences(expected, found), "end of log": log[-1500:]}
    print(json.dumps({key: value for key, value in result.items() if key != "end of log"}), flush=True)
    return result


def wait_for(
    process: subprocess.Popen, output: Path, rng: random.Random, seconds: float, *, aims_at_saving: bool
) -> None:
    """Wait for a random moment of the run, or for one while a random checkpoint is being written."""
    if not aims_at_saving:
        moment = time.monotonic() + seconds * rng.random() ** 0.5  # later is likelier: starting takes long
        while time.monotonic() < moment and process.poll() is None:
            time.sleep(0.01)
        return
    saves_to_pass, seen = rng.randrange(3), set()
    while process.poll() is None and len(seen) <= saves_to_pass:
        seen |= {path.name for path in (output / "checkpoints").glob(".saving*")}
        time.sleep(0.001)
    time.sleep(rng.random() * 0.05)


def kill(process: subprocess.Popen, output: Path, rng: random.Random) -> tuple[str | None, bool]:
    """Kill all processes of a run, or one rank alone. Returns what it was doing, None where it had ended."""
    files = {path: int(path.suffix[1:]) for path in sorted(stacks(output).iterdir())}
    alone = len(files) > 1 and rng.random() < 0.5
    victim, pid = rng.choice(list(files.items())) if files else (None, process.pid)
    if process.poll() is not None:
        return None, alone
    try:
        if victim:
            os.kill(pid, signal.SIGUSR2)
            time.sleep(0.02)
        for target in [pid] if alone else [process.pid, *files.values()]:
            os.kill(target, signal.SIGKILL)
    except ProcessLookupError:
        process.wait(timeout=120)
        return None, alone
    process.wait(timeout=120)
    while not all(map(is_gone, files.values())):  # a launcher that was killed leaves its children alone
        time.sleep(0.1)
    return phase_of(victim.read_text() if victim else ""), alone


def phase_of(stack: str) -> str:
    """What a process was doing, by its stack."""
    return next((name for name, words in PHASES if any(word in stack for word in words)), "starting")


def last_step(output: Path) -> int:
    """The last step in a run's metrics."""
    path = output / "metrics.jsonl"
    steps = [0]
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            steps.append(json.loads(line)["step"])
        except ValueError:
            continue  # the line that was being written
    return max(steps)


def resumed_step(log: str) -> int:
    """The optimiser step that a run went on from, by its console; 0 where it began again."""
    found = re.findall(r"going on from checkpoint \S+/step_(\d+)", log)
    return int(found[-1]) if found else 0


def outcome(output: Path) -> dict[str, Any]:
    """Checksums of the weights, and all figures but those of time and memory."""
    models = sorted(path for path in output.rglob("*.safetensors") if "checkpoints" not in path.parts)
    files = {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in models}
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((output / "summary.json").read_text())
    return {"weights": files, "metrics": [lasting(line) for line in lines], "summary": lasting(summary)}


def lasting(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures that equal runs share."""
    return {name: value for name, value in figures.items() if not name.startswith(CHANGING)}


def differences(expected: dict[str, Any], found: dict[str, Any] | None) -> list[str]:
    """The parts that differ."""
    return ["all"] if found is None else [part for part in expected if expected[part] != found[part]]


def report(results: list[dict[str, Any]]) -> int:
    """Print the table; returns the exit code."""
    from rich.console import Console
    from rich.table import Table

    phases = [name for name, _ in PHASES] + ["starting"]
    table = Table(title="SIGKILLs by step and by what was going on")
    for heading in ("case", *phases, "kills", "not equal"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for case in (*(case.name for case in CASES), "all"):
        own = [result for result in results if case in (result["case"], "all")]
        counts = Counter(result["phase"] for result in own)
        unequal = sum(not result["equal"] for result in own)
        table.add_row(case, *(str(counts[phase]) for phase in phases), str(len(own)), str(unequal))
    Console(width=140).print(table)
    survived = sum(result["equal"] for result in results)
    alone = sum(result["one rank alone"] for result in results)
    print(
        f"{len(results)} kills ({alone} of one rank alone), {survived} resumed to equal weights and metrics"
    )
    return 0 if survived == len(results) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        sys.exit(main())
