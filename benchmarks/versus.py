"""This project beside its peers, on one machine, in one run: speed, memory, start; one table with the goals.

    python benchmarks/versus.py --preset cpu --hh-data hh/test.jsonl.gz --trl-python trl-env/bin/python \\
        --trl-ppo-python trl112-env/bin/python --output benchmarks/results/versus.md

Every run is a process of its own; competitors take turns (A B A B), and the table has medians and the spread.
All learn from the same rows and the same weights, each in its own batches. The first steps of a run are not
timed, for anyone. With --threads 1 the figures are samples per second of processor time, which a busy machine
hardly moves.

A further peer is a command of one's own, --peer NAME='COMMAND', with {workload} {model} {reward} {rows}
{data} {output} {batch} {steps} {left_out} filled in. The last line of its output that is a JSON object has
`samples_per_second`, and may have the other keys of `versus_marks.Marks.report`; a command that fails is
shown as not run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import versus_report
from versus_marks import STARTED, last_json_line
from versus_setting import MAX_ANSWER, WORKLOADS, Workload, our_flags

Competitor = tuple[str, list[str] | None, str]
"""Its name, its command or None, and why there is none."""

PRESETS = {"cpu": ("sft", "reward", "ppo", "rollout", "start", "sft-89m", "rloo"), "quick": ("sft", "ppo")}
"""The workloads of each; their sizes are those of `versus_setting.py`."""

TRL = {"sft": ("TRL", "sft"), "reward": ("TRL", "reward"), "rloo": ("TRL", "rloo"), "sft-89m": ("TRL", "sft")}
"""The trainers of --trl-python by workload; packing is a second one for sft, PPO is of --trl-ppo-python."""


def main() -> None:
    """Prepare, run, report."""
    args = parse()
    args.folder.mkdir(parents=True, exist_ok=True)
    args.folder, args.hh_data, started = args.folder.resolve(), args.hh_data.resolve(), time.monotonic()
    if not (args.folder / "setting.json").exists():
        program = str(ROOT / "benchmarks" / "versus_setting.py")
        prepare = [sys.executable, program, str(args.folder), "--hh-data", str(args.hh_data)]
        subprocess.run(prepare, check=True, env=environment(args), cwd=ROOT)
    results: dict[str, Any] = {
        "threads": args.threads,
        "rounds": args.rounds,
        "setting": json.loads((args.folder / "setting.json").read_text()),
        "versions": versions(args),
        "command": shlex.join(["python", "benchmarks/versus.py", *sys.argv[1:]]),
        "not_run": {},
        "runs": {},
    }
    text = ""
    for name in args.only or PRESETS[args.preset]:
        run = {"rollout": run_rollout, "start": run_start}.get(name)
        found = run(args) if run else run_workload(args, WORKLOADS[name], results["not_run"])
        results["runs"][name] = found
        results["minutes"] = (time.monotonic() - started) / 60
        (args.folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        text = versus_report.report(results)
        if args.output:  # so far, lest an interrupted run leave nothing
            args.output.write_text(text)
    print(text)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--preset", choices=tuple(PRESETS), default="cpu", help="Which workloads (default cpu, all).")
    add("--only", nargs="+", choices=PRESETS["cpu"], help="These workloads alone.")
    add("--hh-data", type=Path, required=True, help="JSON lines of preferences, gzip or not.")
    add("--folder", type=Path, default=Path("output/versus"), help="Models, rows, runs and results.json.")
    add("--output", type=Path, help="The Markdown file of the table.")
    add("--threads", type=int, default=2, help="Threads of every run; 1: processor time (default 2).")
    add("--rounds", type=int, default=2, help="Runs of each competitor, in turns (default 2).")
    add("--share", type=float, default=1.0, help="Share of the steps of each run, for a trial (default 1).")
    add("--trl-python", help="A Python with TRL 1.16.")
    add("--trl-ppo-python", help="A Python with TRL 1.12, the last with PPO.")
    add("--peer", action="append", default=[], metavar="NAME=COMMAND", help="A further peer, see above.")
    add("--before", type=Path, help="An older checkout of this project, as a competitor.")
    add("--our-flags", default="", help="More flags for all of our steps, as one argument.")
    add("--timeout", type=float, default=900, help="Seconds that a run may take (default 900).")
    args = parser.parse_args()
    for peer in args.peer:
        if "=" not in peer:
            parser.error(f"--peer {peer!r}: NAME='COMMAND' is wanted")
    return args


def environment(args: argparse.Namespace) -> dict[str, str]:
    """Of every run: its threads, and no network."""
    threads = str(args.threads)
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ""}
    # Our steps make their choices by timing anew, as those remembered may be of a busy machine; what
    # DeepSpeed has compiled for the user is kept.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    quiet["XDG_CACHE_HOME"] = str(args.folder / "user-cache")
    quiet["TORCH_EXTENSIONS_DIR"] = os.environ.get("TORCH_EXTENSIONS_DIR") or str(cache / "torch_extensions")
    return {**os.environ, **quiet, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


def steps_of(args: argparse.Namespace, workload: Workload) -> tuple[int, int]:
    """Steps of a run, and how many of them are not timed."""
    steps = max(4, round(workload.num_steps * args.share))
    return steps, max(1, min(workload.left_out, steps // 4))


def ours(args: argparse.Namespace, checkout: Path, workload: Workload, output: Path) -> list[str]:
    """The command of a run of ours."""
    steps, left_out = steps_of(args, workload)
    flags = our_flags(workload, args.folder, args.hh_data, steps)
    more = shlex.split(args.our_flags) if checkout == ROOT else []
    program = [str(ROOT / "benchmarks" / "versus_ours.py"), str(checkout), str(left_out), workload.program]
    return [sys.executable, *program, *flags, *more, "--output_dir", str(output)]


def trl(args: argparse.Namespace, python: str, trainer: str, workload: Workload, output: Path) -> list[str]:
    """The command of a run of TRL."""
    steps, left_out = steps_of(args, workload)
    if trainer == "sft-packing":  # about half as many steps, as a batch of packs holds about twice the rows
        steps = max(left_out + 2, round(0.55 * steps))
    model = "sft" if workload.step == "rlhf" else workload.model
    return [
        python, str(ROOT / "benchmarks" / "versus_trl.py"), trainer,
        "--model", str(args.folder / model), "--reward", str(args.folder / "reward"),
        "--rows", str(args.folder / f"{workload.rows}.jsonl"), "--output", str(output),
        "--batch", str(workload.batch), "--steps", str(steps), "--left-out", str(left_out),
        "--max-answer", str(MAX_ANSWER),
    ]  # fmt: skip


def peer(args: argparse.Namespace, template: str, workload: Workload, output: Path) -> list[str]:
    """The command of a run of a peer of the user's."""
    steps, left_out = steps_of(args, workload)
    model = "sft" if workload.step == "rlhf" else workload.model
    places = {
        "workload": workload.name, "model": args.folder / model, "reward": args.folder / "reward",
        "rows": args.folder / f"{workload.rows}.jsonl", "data": args.hh_data, "output": output,
        "batch": workload.batch, "steps": steps, "left_out": left_out,
    }  # fmt: skip
    return [part.format(**places) for part in shlex.split(template)]


def competitors(args: argparse.Namespace, workload: Workload, output: Path) -> list[Competitor]:
    """Who does a workload, and how."""
    found: list[Competitor] = [("ours", ours(args, ROOT, workload, output), "")]
    if args.before:
        found.append(("ours before", ours(args, args.before.resolve(), workload, output), ""))
    if workload.name in TRL:
        trainers = [TRL[workload.name]]
        trainers += [("TRL packing", "sft-packing")] if workload.name == "sft" else []
        for name, trainer in trainers:
            python = args.trl_python
            found.append(
                (name, trl(args, python, trainer, workload, output) if python else None, "no --trl-python")
            )
    if workload.name == "ppo":
        python = args.trl_ppo_python
        found.append(
            ("TRL", trl(args, python, "ppo", workload, output) if python else None, "no --trl-ppo-python")
        )
    for text in args.peer:
        name, _, template = text.partition("=")
        found.append((name, peer(args, template, workload, output), ""))
    return found


def run_workload(
    args: argparse.Namespace, workload: Workload, not_run: dict[str, str]
) -> dict[str, list[dict]]:
    """The reports of each competitor's runs. Who cannot run is noted in `not_run` with the reason."""
    found: dict[str, list[dict]] = {}
    warm_up(args, workload)
    for round_number in range(args.rounds):
        output = args.folder / "runs" / workload.name
        for name, command, reason in competitors(args, workload, output):
            key = f"{workload.name}: {name}"
            if command is None:
                not_run[key] = reason
            if key in not_run:
                continue
            subprocess.run(["rm", "-rf", str(output)], check=True)
            output.mkdir(parents=True)
            log = args.folder / "logs" / f"{workload.name}-{name.replace(' ', '-')}-{round_number}.txt"
            report, reason = timed_run(args, command, log)
            if report is None:
                not_run[key] = reason
            else:
                found.setdefault(name, []).append(report)
                said = f"{rate(report, args.threads):.2f}/s, {report.get('training_peak_mib') or 0:.0f} MiB"
                print(f"{workload.title}, {name}: {said}", file=sys.stderr, flush=True)
    return found


def warm_up(args: argparse.Namespace, workload: Workload) -> None:
    """A short run of ours that is not counted: it makes the choices that a machine makes once."""
    short = argparse.Namespace(**{**vars(args), "share": 0.0})
    output = args.folder / "runs" / f"{workload.name}-warm-up"
    subprocess.run(["rm", "-rf", str(output)], check=True)
    timed_run(
        args, ours(short, ROOT, workload, output), args.folder / "logs" / f"{workload.name}-warm-up.txt"
    )


def rate(report: dict[str, Any], threads: int) -> float:
    """Samples a second: of the clock, or with one thread of processor time where the run reports it."""
    return (
        report.get("samples_per_cpu_second" if threads == 1 else "samples_per_second")
        or report["samples_per_second"]
    )


def timed_run(
    args: argparse.Namespace, command: Sequence[str], log: Path
) -> tuple[dict[str, Any] | None, str]:
    """The report of a run, or None and why there is none; its output goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        file.write(shlex.join(command) + "\n")
        file.flush()
        settings = {"env": {**environment(args), STARTED: str(time.time())}, "stderr": subprocess.STDOUT}
        try:
            code = subprocess.run(
                command, stdout=file, timeout=args.timeout, check=False, **settings
            ).returncode
        except (subprocess.TimeoutExpired, OSError) as error:
            return None, f"{type(error).__name__}: see {log}"
    output = log.read_text(errors="replace")
    try:
        report = last_json_line(output)
    except ValueError as error:
        report = {"skip": str(error)}
    if code or "samples_per_second" not in report:
        return None, str(report.get("skip") or f"it ended with {code}, see {log}")
    return report, ""


def run_rollout(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a decode step of each way to decode, from benchmarks/rollout.py."""
    program = [str(ROOT / "benchmarks" / "rollout.py"), "--model-folder", str(args.folder / "6m"), "--json"]
    threads = ["--processor-time"] if args.threads == 1 else []
    log = args.folder / "logs" / "rollout.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    run = subprocess.run(
        [sys.executable, *program, *threads, "--rounds", str(args.rounds)], env=environment(args),
        capture_output=True, text=True, timeout=args.timeout, check=False,
    )  # fmt: skip
    log.write_text(run.stdout + run.stderr)
    try:
        return last_json_line(run.stdout)
    except ValueError:
        return {"failed": f"it ended with {run.returncode}, see {log}"}


def run_start(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of `--help`, each program in turn: of the clock, or with one thread of processor time."""
    commands = {w.program: [sys.executable, str(ROOT / w.program), "--help"] for w in WORKLOADS.values()}
    if args.trl_python:
        commands["trl sft"] = [str(Path(args.trl_python).with_name("trl")), "sft", "--help"]
    found: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(args.rounds + 1):  # the first fills caches
        for name, command in commands.items():
            before, start = os.times(), time.perf_counter()
            ended = subprocess.run(
                command, env=environment(args), capture_output=True, check=False
            ).returncode
            after, seconds = os.times(), time.perf_counter() - start
            cpu = sum(after[2:4]) - sum(before[2:4])
            if not ended:
                found[name].append(cpu if args.threads == 1 else seconds)
    return {name: values[1:] for name, values in found.items() if values[1:]}


def versions(args: argparse.Namespace) -> dict[str, str]:
    """What ran: machine, Python, and the packages of each environment."""
    script = (
        "import importlib.metadata as m, platform\n"
        "names = ('torch', 'transformers', 'deepspeed', 'trl', 'accelerate', 'peft', 'datasets')\n"
        "have = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "found = [f'{n} {have[n]}' for n in names if n in have]\n"
        "print('Python ' + platform.python_version(), *found, sep=', ')"
    )
    found = {"machine": versus_report.machine()}
    pythons = {"ours": sys.executable, "TRL": args.trl_python, "TRL PPO": args.trl_ppo_python}
    for name, python in pythons.items():
        if python:
            run = subprocess.run(
                [python, "-c", script], capture_output=True, text=True, check=False, env=environment(args)
            )
            found[name] = run.stdout.strip() or "unknown"
    for checkout, name in ((ROOT, "ours, commit"), (args.before, "ours before, commit")):
        if checkout:
            command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
            found[name] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return found


if __name__ == "__main__":
    main()
