"""Stop runs at random moments, resume them, and compare with runs that nothing happened to, bit by bit.

python benchmarks/faults.py --kills 60 --terms 20
Two tables at the end. SIGKILLs: by step and by what was going on, with the optimiser steps that were done
twice. SIGTERMs: the same, and how many left a whole checkpoint of the optimiser step that they came in. In
both, runs that ended with other weights or metrics; there must be none. OUTPUT/faults.json has every trial.

Half of the SIGKILLs on two ranks hit one rank alone; the launcher and the other rank have to notice. What a
process was doing is read from a stack that it writes on a signal, just before.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.console.streams import take_over
from dschat.distributed.watchdog import is_gone
from dschat.errors import EXIT_TRY_AGAIN
from dschat.runs.atomic_folder import damage

SFT, REWARD, DPO, PPO = (
    "step1_sft/main.py",
    "step2_reward/main.py",
    "step2_reward/dpo.py",
    "step3_ppo/main.py",
)

SAVE_INTERVAL = 3
"""Optimiser steps between checkpoints: no more may be lost."""

SUPERVISED = (
    "--max_seq_len=64 --per_device_train_batch_size=8 --gradient_accumulation_steps=2 --num_train_epochs=2 "
    "--eval_interval=4 --dropout=0.1 --learning_rate=1e-3"
)
RLHF = (
    "--max_prompt_seq_len=40 --max_answer_seq_len=16 --per_device_generation_batch_size=8 "
    "--generation_batches=2 --per_device_training_batch_size=4 --gradient_accumulation_steps=2 "
    "--ppo_epochs=2 --num_warmup_steps=2 --actor_learning_rate=1e-4 --critic_learning_rate=3e-4 "
    "--kl_target=0.5 --score_normalization=running --enable_ema --eval_interval=3"
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
    ("saving", ("checkpoint.py", "save_checkpoint")),
    ("exporting", ("export_model",)),
    ("evaluating", ("evaluation.py", "evaluations.py", "reference_logprobs.py")),
    ("generating", ("hf_generate.py", "static_decoding.py")),
    ("analysing", ("analysis.py",)),
    ("training", ("train_on", "updates.py", "train_epochs", "train.py")),
    ("loading", ("loading.py", "rlhf_engine.py", "build.py", "manifest.py", "preparation.py")),
)
"""What is going on, by words of the stack; the first that fits counts."""

CHANGING = ("seconds", "tokens_per_second", "flops_per_second", "peak_share", "peak_memory_gib")
"""Figures that differ between equal runs."""


def main() -> int:
    """Prepare, run every case without faults, then the trials. The exit code is 1 where anything is amiss."""
    take_over()
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
        seconds = time.monotonic() - start
        training = max(ended_steps(folder).values()) - min(ended_steps(folder).values())
        references[case.name] = (outcome(folder), seconds, training)
        print(f"{case.name}: {seconds:.1f} s without a fault, {training:.1f} s of them training", flush=True)
    rng = random.Random(args.seed)
    kinds = [signal.SIGKILL] * args.kills + [signal.SIGTERM] * args.terms
    trials = [(n, CASES[n % len(CASES)], kind, rng.random()) for n, kind in enumerate(kinds)]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda trial: run_trial(*trial, references=references, args=args), trials))
    (args.output_dir / "faults.json").write_text(json.dumps(results, indent=2) + "\n")
    return report(results)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--kills", type=int, default=60, help="SIGKILLs, dealt to the cases in turn (default 60).")
    add("--terms", type=int, default=20, help="SIGTERMs (default 20).")
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
    flags += ["--data_split=1,1,1", f"--output_dir={output}", f"--save_interval={SAVE_INTERVAL}"]
    flags += [*case.flags.split(), *more]
    launcher = [sys.executable]
    if case.ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={case.ranks}"]
    return [*launcher, str(Path(__file__).resolve()), "--child", str(stacks(output)), case.program, *flags]


def stacks(output: Path) -> Path:
    """Where the processes of a run write what they are doing, one file a process."""
    return output.parent / f"{output.name}.stacks"


def steps_file(output: Path) -> Path:
    """Where a run writes when each optimiser step ended."""
    return output.parent / f"{output.name}.steps"


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
    """Run a step's program in this process, which writes its stack on SIGUSR2 and when each step ended."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        note_steps(steps_file(Path(folder).with_suffix("")))
    with Path(folder, f"{rank}.{os.getpid()}").open("w") as stack:
        faulthandler.register(signal.SIGUSR2, file=stack, all_threads=False)
        sys.argv = [str(ROOT / program), *flags]
        runpy.run_path(sys.argv[0], run_name="__main__")


def note_steps(path: Path) -> None:
    """From here on add a line to the file when an optimiser step has ended: the time and its number."""
    from dschat.checkpoints.checkpoint import Checkpoints

    is_due = Checkpoints.is_due

    def noting(self: Checkpoints, step: int, **how: Any) -> bool:
        with path.open("a") as file:
            file.write(f"{time.time()} {step}\n")
        return is_due(self, step, **how)

    Checkpoints.is_due = noting  # type: ignore[method-assign]


def ended_steps(output: Path) -> dict[int, float]:
    """When each optimiser step ended."""
    path = steps_file(output)
    lines = [line.split() for line in path.read_text().splitlines()] if path.is_file() else []
    return {int(step): float(moment) for moment, step in lines}


def run_trial(
    number: int,
    case: Case,
    kind: signal.Signals,
    moment: float,
    references: dict[str, tuple[Any, float, float]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Start a case, stop it at a moment, resume it to the end, compare."""
    output = args.output_dir / "trials" / f"{number:03d}"
    expected, *durations = references[case.name]
    rng = random.Random(moment)
    phase = None
    while phase is None:  # where it had finished: again
        shutil.rmtree(output, ignore_errors=True)
        for beside in (output.with_suffix(".log"), steps_file(output)):
            beside.unlink(missing_ok=True)
        process = start_run(case, output, args.output_dir)
        aims_at_saving = kind == signal.SIGKILL and rng.random() < 0.25
        wait_for(process, output, rng, durations, aims_at_saving=aims_at_saving)
        phase, figures = (kill if kind == signal.SIGKILL else terminate)(process, output, rng)
    before = last_step(output)
    has_finished = (output / "summary.json").is_file()  # what still ends then loses nothing
    updates = before * (UPDATES_PER_PPO_STEP if case.program == PPO else 1)
    code, log = finish(start_run(case, output, args.output_dir, "--resume_from_checkpoint=latest"), output)
    found = outcome(output) if code == 0 else None
    lost = 0 if has_finished else max(0, updates - resumed_step(log))
    result = {
        "trial": number,
        "signal": kind.name,
        "case": case.name,
        "phase": phase,
        "step when stopped": before,
        **figures,
        "steps lost": lost,
        "exit code": code,
        "equal": found == expected,
    }
    result["amiss"] = not result["equal"] or lost > SAVE_INTERVAL or figures.get("whole") is False
    if not result["amiss"]:
        shutil.rmtree(output)
    else:
        result |= {"differs in": differences(expected, found), "end of log": log[-1500:]}
    print(json.dumps({key: value for key, value in result.items() if key != "end of log"}), flush=True)
    return result


def wait_for(
    process: subprocess.Popen,
    output: Path,
    rng: random.Random,
    durations: Sequence[float],
    *,
    aims_at_saving: bool,
) -> None:
    """Wait for a random moment of the run, or for one while a random checkpoint is being written.

    `durations` are those of a whole run and of its training, in seconds. A third of the moments may lie
    anywhere, the others after the first optimiser step: programs of tiny models mostly start.
    """
    if not aims_at_saving:
        whole, training = durations
        after_first_step = rng.random() < 2 / 3
        while after_first_step and not steps_file(output).is_file() and process.poll() is None:
            time.sleep(0.01)
        moment = time.monotonic() + rng.random() * (training if after_first_step else whole)
        while time.monotonic() < moment and process.poll() is None:
            time.sleep(0.01)
        return
    saves_to_pass = rng.randrange(3)
    seen: set[str] = set()
    while process.poll() is None and len(seen) <= saves_to_pass:
        seen |= {path.name for path in (output / "checkpoints").glob(".saving*")}
        time.sleep(0.001)
    time.sleep(rng.random() * 0.05)


def kill(process: subprocess.Popen, output: Path, rng: random.Random) -> tuple[str | None, dict[str, Any]]:
    """SIGKILL for all processes of a run, or one rank alone.

    Returns what it was doing, None where it had ended, and whether one rank alone was hit.
    """
    files = processes(output)
    alone = len(files) > 1 and rng.random() < 0.5
    victim = rng.choice(list(files)) if files else None
    if process.poll() is not None:
        return None, {}
    try:
        phase = phase_now(victim, files)
        everyone = [process.pid, *(child.pid for child in psutil.Process(process.pid).children())]
        for target in [files[victim]] if alone and victim else everyone:
            os.kill(target, signal.SIGKILL)
    except (ProcessLookupError, psutil.NoSuchProcess):
        process.wait(timeout=120)
        return None, {}
    process.wait(timeout=120)
    while not all(map(is_gone, everyone)):
        time.sleep(0.1)
    return phase, {"one rank alone": alone}


def terminate(
    process: subprocess.Popen, output: Path, rng: random.Random
) -> tuple[str | None, dict[str, Any]]:
    """SIGTERM for the launcher, or the process where there is none, which ends the run in its own time.

    Returns what it was doing, None where it had ended, and what came of it. "whole": it ended no more than
    the step it was in, and of that there is a whole checkpoint; None before and after training, where the
    signal ends the program at once.
    """
    files = processes(output)
    if process.poll() is not None:
        return None, {}
    try:
        phase = phase_now(rng.choice(list(files)) if files else None, files)
        moment = time.time()
        process.send_signal(signal.SIGTERM)
    except ProcessLookupError:
        process.wait(timeout=120)
        return None, {}
    code = process.wait(timeout=120)
    seconds = time.time() - moment
    while not all(map(is_gone, files.values())):
        time.sleep(0.1)
    if (output / "summary.json").is_file():
        return None, {}
    steps = ended_steps(output)
    ended = sum(end > moment for end in steps.values())
    obeyed = code == EXIT_TRY_AGAIN or "as SIGTERM asked" in output.with_suffix(".log").read_text()
    whole = None
    if obeyed:
        whole = ended <= 1 and damage(output / "checkpoints" / f"step_{max(steps):08d}") is None
    elif phase not in ("starting", "loading", "evaluating", "exporting"):
        whole = False
    return phase, {"ended with": code, "seconds": seconds, "steps ended": ended, "whole": whole}


def processes(output: Path) -> dict[Path, int]:
    """The ranks of a run that have started: the file of each one's stack, and its process."""
    return {path: int(path.suffix[1:]) for path in sorted(stacks(output).iterdir())}


def phase_now(victim: Path | None, files: dict[Path, int]) -> str:
    """What that rank is doing."""
    if victim is None:
        return "starting"
    os.kill(files[victim], signal.SIGUSR2)
    time.sleep(0.02)
    return phase_of(victim.read_text())


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
    """Print a table for each signal; returns the exit code."""
    from rich.console import Console
    from rich.table import Table

    phases = [name for name, _ in PHASES] + ["starting"]
    for kind in ("SIGKILL", "SIGTERM"):
        mine = [result for result in results if result["signal"] == kind]
        if not mine:
            continue
        table = Table(title=f"{kind}s by step and by what was going on")
        for heading in ("case", *phases, "all", "most lost", "amiss"):
            table.add_column(heading, justify="left" if heading == "case" else "right")
        for case in (*(case.name for case in CASES), "all"):
            own = [result for result in mine if case in (result["case"], "all")]
            counts = Counter(result["phase"] for result in own)
            lost = max((result["steps lost"] for result in own), default=0)
            amiss = sum(result["amiss"] for result in own)
            numbers = [*(counts[phase] for phase in phases), len(own), lost, amiss]
            table.add_row(case, *map(str, numbers))
        Console(width=150).print(table)
        print(f"{len(mine)} {kind}s: {summed_up(mine)}")
    return int(any(result["amiss"] for result in results))


def summed_up(mine: list[dict[str, Any]]) -> str:
    """One line on the trials of one signal."""
    parts = [f"{sum(result['equal'] for result in mine)} resumed to equal weights and metrics"]
    alone = sum(result.get("one rank alone", False) for result in mine)
    if alone:
        parts.append(f"{alone} of one rank alone")
    obeyed = [result for result in mine if result.get("whole") is not None]
    if obeyed:
        parts.append(
            f"{len(obeyed)} in training, of which {sum(result['whole'] for result in obeyed)} left a whole "
            f"checkpoint of the step they were in, {max(result['seconds'] for result in obeyed):.1f} s after "
            "the signal at most"
        )
    return "; ".join([*parts, f"{sum(result['steps lost'] for result in mine)} optimiser steps done twice"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        sys.exit(main())
