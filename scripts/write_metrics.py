"""Write docs/metrics.md: every metric of the steps, from dschat/runs/registry.py.

python scripts/write_metrics.py          writes docs/metrics.md; a test says when it is stale
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.runs.registry import METRICS, STEPS, SUPERVISED, Metric
from scripts.write_flags import COMMANDS

PAGE = ROOT / "docs" / "metrics.md"
START = """\
# Metrics

Every metric of the steps, its healthy values, and when to worry; written by `scripts/write_metrics.py` from
`dschat/runs/registry.py`. `metrics.jsonl` in `--output_dir` has one JSON object per optimiser step, in PPO
per PPO step, and one per evaluation of steps 1 and 2 and of DPO. Trackers have the same numbers under
GROUP/NAME: `actor/kl`, `eval/loss`. Metrics are over all ranks, and means over tokens leave padding out. A
value that is not finite is null. In PPO, step 0 is the evaluation before the first PPO step; the answers of a
PPO step are of the policy before its update, an evaluation is of the policy after it.

Healthy values are those of usual runs: a metric outside of them is a reason to look, not an error. The guard
([ppo.md](ppo.md)) ends PPO runs by its own limits; [performance.md](performance.md) has more on speed, and
[trackers.md](trackers.md) on TensorBoard, Weights & Biases, MLflow and trackio.
"""
GROUPS = {
    "train": "training",
    "rollout": "answers",
    "actor": "the actor",
    "critic": "the critic",
    "eval": "evaluations",
    "eval_command": "`--eval_command`",
    "speed": "speed",
}


def page() -> str:
    """The whole page."""
    lines = [START]
    for title, steps in (("Steps 1, 2 and DPO", SUPERVISED), ("PPO", ("rlhf",)), ("All steps", STEPS)):
        entries = [entry for entry in METRICS if set(entry.steps) <= set(steps)]
        if steps == STEPS:
            entries = [entry for entry in METRICS if entry.steps == STEPS]
        for group, name in GROUPS.items():
            rows = [row(entry, names_steps=steps == SUPERVISED) for entry in entries if entry.group == group]
            if rows:
                lines += ["", f"## {title}: {name} (`{group}`)", "", *heading(steps == SUPERVISED), *rows]
    return "\n".join(lines)


def heading(names_steps: bool) -> list[str]:
    """The first two lines of a table."""
    columns = ["metric", *(["in"] if names_steps else []), "unit", "meaning", "healthy", "outside of that"]
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]


def row(entry: Metric, *, names_steps: bool) -> str:
    """A line of a table."""
    steps = [", ".join(COMMANDS[step] for step in entry.steps)] if names_steps else []
    cells = [f"`{entry.name}`", *steps, entry.unit, entry.meaning, entry.healthy, entry.remedy]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page() + "\n", encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
