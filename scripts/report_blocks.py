"""The blocks of the page about a run: made of what `report_runs` finds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dschat.reports.page import Block, Plot, Plots, Samples, Section, Table, Text, Verdict, Warnings
from dschat.reports.plots import curves
from dschat.reports.reward_model import level_of
from dschat.runs.output_folder import FORECAST
from dschat.runs.registry import Metric, metric
from scripts.report_runs import TITLES, Run, read_json, started

MAIN = {
    "sft": ("loss", "eval_perplexity", "grad_norm", "learning_rate"),
    "reward": ("loss", "accuracy", "grad_norm", "learning_rate"),
    "dpo": ("loss", "accuracy", "grad_norm", "learning_rate"),
    "rlhf": ("score", "kl", "eval_objective", "entropy", "answer_length", "eos_share", "approx_kl",
             "clip_fraction", "explained_variance"),
}  # fmt: skip
"""Metrics whose curves are in sight; those of evaluations stand in the plot of the metric in training."""
MAX_POINTS = 400
"""Of a curve; of longer ones every n-th."""
MAX_OTHERS = 36
"""Curves of other metrics."""
NUM_SAMPLES = 3
LAST_LINES = 25
GB = 1e9


def blocks_of(output_dir: Path, runs: Sequence[Run]) -> list[Block]:
    """The whole page: verdicts of all steps first, then a section for each."""
    blocks: list[Block] = [block for run in runs for block in verdicts(run)]
    blocks += comparison(output_dir)
    for run in runs:
        blocks.append(Section(f"{title_of(run)}: {run.folder}", list(step_blocks(run))))
    return blocks


def title_of(run: Run) -> str:
    """The step in words."""
    return TITLES[run.step]


def verdicts(run: Run) -> Iterator[Verdict]:
    """Whether the step finished, and what it comes to."""
    title = title_of(run)
    if run.summary is None:
        seen = f"the last metrics are of step {run.last_step}" if run.metrics else "it has no metrics"
        why = (
            f": {run.failure}" if run.failure else "; its log says neither that it failed nor that it stopped"
        )
        yield Verdict(f"{title} has not finished", f"{seen}{why}", "warning")
    words = str((run.summary or {}).get("verdict", ""))
    if words:
        word, _, reason = words.partition(": ")
        if run.step == "reward":
            level = level_of(word)
        else:
            level = "good" if word.startswith("better") else "bad" if word.startswith("worse") else "warning"
        yield Verdict(f"{title}: {word}", reason, level)
    elif run.summary is not None:
        yield Verdict(f"{title} has finished", figures_in_words(run.summary), "good")
    told = run.json(FORECAST)
    if isinstance(told, dict) and {"verdict", "is_worth_it"} <= told.keys():
        yield Verdict(
            "The forecast before PPO", str(told["verdict"]), "good" if told["is_worth_it"] else "bad"
        )


def figures_in_words(summary: dict[str, Any]) -> str:
    """A finished step in a line."""
    names = ("initial_eval_loss", "eval_loss", "eval_perplexity", "score", "kl")
    known = [f"{name} {summary[name]:.4g}" for name in names if isinstance(summary.get(name), int | float)]
    return ", ".join(known)


def comparison(output_dir: Path) -> Iterator[Block]:
    """What the comparison of a pipeline says, where there is one."""
    found = read_json(output_dir / "comparison.json")
    if not isinstance(found, dict) or not {"verdicts", "figures", "samples"} <= found.keys():
        return
    for sentence in found["verdicts"]:
        words, _, reason = str(sentence).partition(": ")
        is_better, is_worse = " is better than " in words, " is worse than " in words
        yield Verdict(words, reason, "good" if is_better else "bad" if is_worse else "neutral")
    samples = [
        Samples(
            f"Prompt {number}", str(one["prompt"]).strip(), [(n, t, "") for n, t in one["answers"].items()]
        )
        for number, one in enumerate(found["samples"][:NUM_SAMPLES], start=1)
    ]
    which = found["prompts"]
    blocks: list[Block] = [Text(f"{which['number']} prompts: {which['which']}.", faint=True)]
    yield Section("Answers before and after", [*blocks, Warnings(which["warnings"]), *samples])


def step_blocks(run: Run) -> Iterator[Block]:
    """All about one step."""
    outside = list(unhealthy(run))
    if outside or run.warnings:
        yield Section("Warnings", [Warnings([*outside, *run.warnings])], collapsed=not outside)
    all_curves = run.curves
    main = [name for name in MAIN.get(run.step, ()) if name in all_curves or f"eval_{name}" in all_curves]
    plots = [curve(run, name, all_curves) for name in main]
    if plots:
        yield Plots(plots)
    shown = {*main, *(f"eval_{name}" for name in main)}
    others = [
        name
        for name in all_curves
        if name not in shown
        and not name.startswith("seconds_")
        and not (name.startswith("eval_") and name.removeprefix("eval_") in all_curves)
    ]
    if others:
        more = [curve(run, name, all_curves) for name in others[:MAX_OTHERS]]
        yield Section(f"{len(more)} other metrics", [Plots(more)], collapsed=True)
    yield from time_and_memory(run)
    yield from samples_of(run)
    if run.summary is None and run.log:
        lines = "\n".join(run.log[-LAST_LINES:]).strip()
        yield Section("The last lines of the log", [Samples("log", "", [("", lines, "")])])
    if run.summary:
        rows = [(name, shown_value(value)) for name, value in run.summary.items()]
        yield Section("Summary", [Table(rows)], collapsed=True)
    yield from origin(run)


def entry(run: Run, name: str) -> Metric | None:
    """The registry's entry of a metric; None of one that it does not know, as of an older version."""
    try:
        return metric(name, run.step or None)
    except KeyError:
        return None


def curve(run: Run, name: str, all_curves: dict[str, tuple[list[float], list[float]]]) -> Plot:
    """A metric's curve, with that of the evaluations, and what its values mean."""
    series = [
        (label, *thinned(*all_curves[key]))
        for label, key in (("training", name), ("held out", f"eval_{name}"))
        if key in all_curves
    ]
    known = entry(run, name) or entry(run, f"eval_{name}")
    if known is None:
        return curves(name, series, x="step")
    bounds = tuple(bound if math.isfinite(bound) else None for bound in (known.low, known.high))
    healthy = f" Healthy: {known.healthy}." if known.healthy else ""
    return curves(
        name,
        series,
        x="PPO step" if run.step == "rlhf" else "optimiser step",
        y=known.unit,
        note=f"{known.meaning}.{healthy}".replace("`", ""),
        healthy=(bounds[0], bounds[1]),
    )


def thinned(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """At most `MAX_POINTS` points, the last among them."""
    each = -(-len(steps) // MAX_POINTS)
    return steps[::-1][::each][::-1], values[::-1][::each][::-1]


def unhealthy(run: Run) -> Iterator[str]:
    """The metrics whose mean over the last tenth of the run lies outside of what is healthy."""
    for name, (_, values) in run.curves.items():
        known = entry(run, name)
        last = values[-max(1, len(values) // 10) :]
        value = sum(last) / len(last)
        if known is not None and not known.is_healthy(value):
            yield f"{name} ends at {value:.4g}; healthy is {known.healthy}. {known.remedy}".rstrip(". ") + "."


def time_and_memory(run: Run) -> Iterator[Block]:
    """Seconds by phase and the peak of memory, beside the plan where there is one."""
    plan = run.json("plan.json")
    plan = plan if isinstance(plan, dict) else {}
    measured = plan.get("measured") if isinstance(plan.get("measured"), dict) else {}
    assert isinstance(measured, dict)
    rows = []
    predicted = plan.get("seconds") if isinstance(plan.get("seconds"), dict) else {}
    assert isinstance(predicted, dict)
    for name, (_, values) in run.curves.items():
        if name.startswith("seconds_"):
            phase = name.removeprefix("seconds_")
            mean = sum(values) / len(values)
            rows.append((f"{phase}, seconds a step", shown_value(predicted.get(phase)), f"{mean:.3g}"))
    peak = measured.get("device_peak") or peak_of(run)
    if peak or plan.get("device_peak"):
        rows.append(("peak memory, GB", gigabytes(plan.get("device_peak")), gigabytes(peak)))
    if isinstance((run.summary or {}).get("seconds"), int | float):
        rows.append(("the whole step, seconds", "", f"{run.summary['seconds']:.0f}"))
    if rows:
        yield Section("Time and memory", [Table(rows, columns=("", "planned", "measured"))])


def peak_of(run: Run) -> float | None:
    """The largest `peak_memory_gib` in bytes."""
    values = run.curves.get("peak_memory_gib", ([], []))[1]
    return max(values) * 2**30 if values else None


def gigabytes(value: Any) -> str:
    """Bytes in GB."""
    return f"{value / GB:.2f}" if isinstance(value, int | float) else "-"


def samples_of(run: Run) -> Iterator[Block]:
    """Answers of the first and the last PPO step that kept some."""
    lines = [line for line in run.lines("samples.jsonl") if {"step", "prompt", "answer"} <= line.keys()]
    if not lines:
        return
    steps = sorted({line["step"] for line in lines})
    shown: list[Block] = []
    for step in dict.fromkeys((steps[0], steps[-1])):
        of_step = [line for line in lines if line["step"] == step][:NUM_SAMPLES]
        for line in of_step:
            note = ", ".join(f"{name} {shown_value(line.get(name))}" for name in ("score", "kl", "length"))
            text = (f"answer of PPO step {step}", str(line["answer"]), note)
            shown.append(Samples("", str(line["prompt"]).strip(), [text]))
    yield Section("Samples", shown)


def origin(run: Run) -> Iterator[Block]:
    """Command, data, versions, and every flag."""
    begun = started(run)
    data = run.arguments.get("data", {})
    rows = [
        ("command", str(begun.get("command", f"dschat ... --config {run.folder}/arguments.json"))),
        ("started", str(begun.get("time", "-"))),
        ("commit", str(begun.get("commit") or "not noted")),
        ("data", " ".join(map(str, data.get("data_path", []))) or "-"),
        ("split", f"{data.get('data_split', '-')}, held out {data.get('eval_fraction', '-')}"),
        *((name, str(value)) for name, value in dict(begun.get("versions") or {}).items()),
    ]
    yield Section("Command, data and versions", [Table(rows)], collapsed=True)
    flags = [
        (f"{group}.{name}", shown_value(value))
        for group, values in run.arguments.items()
        if isinstance(values, dict)
        for name, value in values.items()
    ]
    if flags:
        yield Section("Every setting", [Table(flags)], collapsed=True)


def shown_value(value: Any) -> str:
    """A value of JSON for a table."""
    if isinstance(value, bool) or value is None:
        return "-" if value is None else str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)
