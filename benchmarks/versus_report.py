"""The table of benchmarks/versus.py as Markdown: medians with their spread, and which goals are met."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from versus_marks import median
from versus_setting import WORKLOADS

Runs = dict[str, list[dict[str, Any]]]
"""The reports of a workload by competitor."""


@dataclass(frozen=True)
class Goal:
    """At least so many times as fast as a peer."""

    workload: str
    peer: str
    factor: float


SPEED_GOALS = (
    Goal("sft", "TRL", 3.0),
    Goal("sft", "TRL packing", 2.0),
    Goal("sft", "DeepSpeed-Chat", 1.7),
    Goal("reward", "TRL", 2.5),
    Goal("ppo", "TRL", 5.0),
    Goal("ppo", "DeepSpeed-Chat", 2.0),
    Goal("sft-89m", "TRL", 2.0),
)
"""Issue 13's. RLOO has none."""
GENERATE_FACTOR, HAND_WRITTEN_FACTOR = 2.0, 1.3
"""Decoding: so many times as fast as generate(), and at most so many times the hand-written loop's time."""
FIRST_STEP_SECONDS, HELP_SECONDS = 4.0, 1.0
MEMORY_WORKLOADS = ("sft", "reward", "ppo")
OURS = "ours"


def report(results: dict[str, Any]) -> str:
    """The whole page."""
    runs, threads = results["runs"], results["threads"]
    names = columns(runs)
    clock = "processor time of one thread" if threads == 1 else f"{threads} threads"
    lines = [
        "# This project beside its peers",
        "",
        f"`{results['command']}`: {results['minutes']:.0f} minutes, {clock}, medians of {results['rounds']} "
        "runs in turns (least to most).",
        "",
        *(f"- {name}: {text}" for name, text in results["versions"].items()),
        f"- setting: {setting(results['setting'])}",
        "",
        table_row(["", *names, "goals"]),
        table_row(["---", *["---:"] * len(names), "---"]),
    ]
    lines += speed_rows(runs, names, threads) + rollout_rows(runs.get("rollout"), names)
    lines += memory_rows(runs, names) + start_rows(runs, names, threads)
    lines += ["", *notes(results)]
    return "\n".join(lines) + "\n"


def columns(runs: dict[str, Any]) -> list[str]:
    """The competitors in the order of their first appearance."""
    found = [name for workload in WORKLOADS for name in runs.get(workload, {})]
    return list(dict.fromkeys([OURS, *found]))


def table_row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def spread(values: Sequence[float], digits: int = 1) -> str:
    """The median, and from where to where the values go."""
    if not values:
        return ""
    ends = f" ({min(values):,.{digits}f} to {max(values):,.{digits}f})" if len(values) > 1 else ""
    return f"{median(values):,.{digits}f}{ends}"


def values_of(runs: Runs, name: str, *keys: str) -> list[float]:
    """The figure of each run of a competitor: that of the first key that is there."""
    found = (next((r[key] for key in keys if r.get(key)), None) for r in runs.get(name, []))
    return [value for value in found if value is not None]


def rates(runs: Runs, name: str, threads: int) -> list[float]:
    """Samples a second of the clock, or with one thread of processor time."""
    keys = ("samples_per_cpu_second",) if threads == 1 else ()
    return values_of(runs, name, *keys, "samples_per_second")


def verdict(met: bool, text: str) -> str:
    """A goal in a cell."""
    return f"{text}: {'met' if met else '**not met**'}"


def row(title: str, names: Sequence[str], cell: Callable[[str], str], goals: Sequence[str] = ()) -> str:
    """A line with a cell of each competitor."""
    return table_row([title, *(cell(name) for name in names), "; ".join(goals)])


def speed_rows(runs: dict[str, Any], names: Sequence[str], threads: int) -> list[str]:
    """Samples a second of each workload."""
    lines = []
    for name, workload in WORKLOADS.items():
        if name in runs:
            found = {who: rates(runs[name], who, threads) for who in names}
            cells = {who: spread(values) for who, values in found.items()}
            lines.append(row(workload.title, names, cells.__getitem__, speed_goals(name, found)))
            lines += phase_rows(runs[name], names) if workload.step == "rlhf" else []
    return lines


def speed_goals(workload: str, found: dict[str, list[float]]) -> list[str]:
    """The goals of a workload, where both have run."""
    said = []
    for goal in SPEED_GOALS:
        if goal.workload == workload and found.get(OURS) and found.get(goal.peer):
            ratio = median(found[OURS]) / median(found[goal.peer])
            said.append(verdict(ratio >= goal.factor, f"{ratio:.2f} of {goal.factor:g} times {goal.peer}"))
    return said


def phase_rows(runs: Runs, names: Sequence[str]) -> list[str]:
    """Seconds of each phase of a PPO step, where a competitor reports them."""
    phases = list(dict.fromkeys(key for found in runs.values() for r in found for key in r.get("phases", {})))

    def cells(phase: str) -> Callable[[str], str]:
        def cell(name: str) -> str:
            return spread([r["phases"][phase] for r in runs.get(name, []) if phase in r.get("phases", {})], 2)

        return cell

    return [row(f"- {phase.removeprefix('seconds_')}, s a step", names, cells(phase)) for phase in phases]


def rollout_rows(found: dict[str, Any] | None, names: Sequence[str]) -> list[str]:
    """Milliseconds a decode step: ours, and in the last column the others and the goals."""
    if not found or "ms_per_step" not in found:
        return []
    times, chosen = found["ms_per_step"], found["chosen"]
    own = median(times[chosen])
    others = [f"{name} {spread(values)}" for name, values in times.items() if name != chosen]
    goals = []
    for name, met, text in (
        ("generate()", lambda t: t / own >= GENERATE_FACTOR, "{:.2f} of 2 times generate()"),
        ("hand-written loop", lambda t: own / t <= HAND_WRITTEN_FACTOR, "{:.2f} of at most 1.3 of the loop"),
    ):
        if name in times:
            time = median(times[name])
            ratio = time / own if name == "generate()" else own / time
            goals.append(verdict(met(time), text.format(ratio)))

    def cell(name: str) -> str:
        return f"{spread(times[chosen])}, {chosen}" if name == OURS else ""

    title = f"rollout of {found['batch']}, ms a decode step"
    return [row(title, names, cell, [*others, *goals])]


def memory_rows(runs: dict[str, Any], names: Sequence[str]) -> list[str]:
    """MiB of the whole process, and up to the last optimiser step."""
    lines = []
    for name, workload in WORKLOADS.items():
        if name not in runs:
            continue
        title = workload.title.split(",")[0]
        found = {who: values_of(runs[name], who, "peak_mib") for who in names}
        peers = [
            median(values) for who, values in found.items() if values and who not in (OURS, "ours before")
        ]
        goals = []
        if name in MEMORY_WORKLOADS and peers and found[OURS]:
            ratio = median(found[OURS]) / min(peers)
            goals = [verdict(ratio <= 1, f"{ratio:.2f} of at most 1 time the leanest peer")]
        cells = {who: spread(values, 0) for who, values in found.items()}
        lines.append(row(f"peak memory, MiB, {title}", names, cells.__getitem__, goals))
        before = {who: spread(values_of(runs[name], who, "training_peak_mib"), 0) for who in names}
        lines.append(row("- up to the last step", names, before.__getitem__))
    return lines


def start_rows(runs: dict[str, Any], names: Sequence[str], threads: int) -> list[str]:
    """Seconds from the command to the first step, and of --help."""
    lines = []
    for name, workload in WORKLOADS.items():
        if name in runs and name != "sft-89m":
            found = {who: values_of(runs[name], who, "first_step_seconds") for who in names}
            goals = []
            if found[OURS] and name in MEMORY_WORKLOADS:
                seconds = median(found[OURS])
                goals = [verdict(seconds < FIRST_STEP_SECONDS, f"{seconds:.1f} of under 4 s")]
            cells = {who: spread(values) for who, values in found.items()}
            title = f"command to first step, s, {workload.title.split(',')[0]}"
            lines.append(row(title, names, cells.__getitem__, goals))
    helps = runs.get("start", {})
    own = [value for name, values in helps.items() if name.startswith("step") for value in values]
    if own:
        met = verdict(median(own) < HELP_SECONDS, f"{median(own):.2f} of under 1 s")

        def cell(name: str) -> str:
            return (
                spread(own, 2)
                if name == OURS
                else spread(helps.get("trl sft", []), 2)
                if name == "TRL"
                else ""
            )

        clock = ", processor time" if threads == 1 else ""
        lines.append(row(f"--help, s{clock}", names, cell, [met]))
    return lines


def notes(results: dict[str, Any]) -> list[str]:
    """What is needed to read the table, and who did not run."""
    lines = [
        "Samples are rows, pairs or answers; a step's samples are counted as they are collated, and padding "
        "is none. Peak memory is that of the process (VmHWM), with the trained model's export, and before, "
        "up to the last optimiser step. The command to the first step is of the clock: from the start of the "
        "process to the end of its first optimiser step, on a warm cache of tokens (peers read tokens from a "
        "file). TRL trains in bf16 autocast over fp32 weights, its default; its packed rows attend to each "
        "other on OPT, which it does not prevent without flash attention.",
        "",
    ]
    if results["not_run"]:
        lines += ["Not run:", *(f"- {key}: {reason}" for key, reason in results["not_run"].items()), ""]
    return lines


def setting(found: dict[str, Any]) -> str:
    """Models and rows in words."""
    sizes = ", ".join(f"{name} {number / 1e6:.2f} million" for name, number in found["parameters"].items())
    tokens = ", ".join(f"{name} {mean:.0f}" for name, mean in found["mean_tokens"].items())
    return (
        f"OPT configurations of random weights ({sizes} parameters), HH pairs; mean tokens of a row: {tokens}"
    )


def machine() -> str:
    """The processor and the number of cores that this process may use."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = found[0] if found else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"
