"""The figures of a run without those that no two equal runs share."""

import json
from pathlib import Path
from typing import Any

TIMED = ("seconds", "tokens_per_second", "flops_per_second", "peak_share", "peak_memory")
"""The beginnings of their names."""


def timeless(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures that equal runs have in common."""
    return {name: value for name, value in figures.items() if not name.startswith(TIMED)}


def timeless_lines(folder: Path) -> list[dict[str, Any]]:
    """Those of each line of a run's metrics.jsonl, in order."""
    return [timeless(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
