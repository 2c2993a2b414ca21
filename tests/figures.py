"""The figures of a run without those that no two equal runs share."""

import json
from pathlib import Path
from typing import Any

from dschat.runs.registry import METRICS, metric

TIMED = ("seconds", "tokens_per_second", "flops_per_second", "peak_share", "peak_memory")
"""The beginnings of their names."""


def timeless(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures that equal runs have in common."""
    return {name: value for name, value in figures.items() if not name.startswith(TIMED)}


def timeless_lines(folder: Path) -> list[dict[str, Any]]:
    """Those of each line of a run's metrics.jsonl, in order."""
    return [timeless(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def unwritten_metrics(step: str, *runs: Path) -> list[str]:
    """Metrics of the registry that no run of the step wrote; `metric` raises for one that it lacks."""
    written = {name for run in runs for line in timeless_lines(run) for name in line} - {"step"}
    described = {metric(name, step).meaning for name in written}
    # The numbers of --eval_command are its own; tests/export/test_eval_command.py has runs with one.
    entries = [m for m in METRICS if step in m.steps and not m.name.startswith((*TIMED, "eval/"))]
    return [m.name for m in entries if m.meaning not in described]
