"""From figures of runs to results.json, a Markdown table and plots. Pure but for `write_report`."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PARTS = {
    "a": "Algorithms on the quickstart task",
    "b": "Choices on and off",
    "c": "Real preferences (Anthropic HH, harmless)",
    "d": "The same task in TRL",
    "e": "A weak reward model: a tenth of the pairs",
}
EQUAL_KL = (0.25, 0.5, 1.0, 1.5)
SMOOTHING = 5
"""PPO steps that a point of a curve is the mean of: a step has few answers."""
NEEDED_GAIN = 0.2


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds (n - 1; 0 of a single one)."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def grouped(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by label, in the order in which labels first come."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["label"], []).append(row)
    return groups


def smoothed(curve: Sequence[dict[str, float]], width: int = SMOOTHING) -> list[dict[str, float]]:
    """Means over each `width` steps on end; fewer at the beginning are left out."""
    if not curve:
        return []
    windows = [curve[end - width : end] for end in range(width, len(curve) + 1)]
    return [{name: sum(point[name] for point in w) / len(w) for name in curve[0]} for w in windows]


def at_kl(curve: Sequence[dict[str, float]], kl: float, name: str) -> float | None:
    """`name` where a smoothed curve first reaches `kl`, linear between points; None if it never does."""
    points = smoothed(curve)
    for before, after in itertools.pairwise(points):
        if before["kl"] <= kl <= after["kl"]:
            share = (kl - before["kl"]) / max(after["kl"] - before["kl"], 1e-12)
            return before[name] + share * (after[name] - before[name])
    return None


def share_text(values: Sequence[float]) -> str:
    """Shares as percent, mean ± spread."""
    mean, spread = mean_and_spread(values)
    return f"{100 * mean:.1f} ± {100 * spread:.1f}"


def number_text(values: Sequence[float], digits: int = 2) -> str:
    """Numbers, mean ± spread."""
    mean, spread = mean_and_spread(values)
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])


def run_table(rows: list[dict[str, Any]], starts: dict[int, dict[str, Any]], *, weak: bool = False) -> str:
    """Success, gain over the SFT model of the same seed, KL, score and seconds of each label."""
    first = list(starts.values())
    score = "weak_score" if weak else "score"
    lines = [
        [
            "SFT",
            share_text([s["success"] for s in first]),
            "",
            "",
            "0",
            number_text([s[score] for s in first]),
            "",
        ]
    ]
    for label, runs in grouped(rows).items():
        gains = [run["success"] - starts[run["seed"]]["success"] for run in runs]
        lines.append(
            [
                label if len(runs) == len(first) else f"{label} ({len(runs)} seed)",
                share_text([run["success"] for run in runs]),
                f"{100 * mean_and_spread(gains)[0]:+.1f}",
                f"{100 * min(gains):+.1f}",
                number_text([run["kl"] for run in runs]),
                number_text([run["score"] for run in runs]),
                number_text([run["seconds"] for run in runs], 0),
            ]
        )
    header = ["run", "success %", "gain, points", "worst seed", "KL, nats", "score", "seconds"]
    return table(header, lines)


def equal_kl_table(rows: list[dict[str, Any]]) -> str:
    """Success and score of the training's answers where a run first reaches a KL; a dash: it never does."""
    lines = []
    for label, runs in grouped(row for row in rows if row["curve"]).items():
        cells = [label]
        for kl in EQUAL_KL:
            found = [(at_kl(r["curve"], kl, "checked_success"), at_kl(r["curve"], kl, "score")) for r in runs]
            reached = [pair for pair in found if None not in pair]
            success, score = zip(*reached, strict=True) if reached else ((), ())
            note = f" ({len(reached)} of {len(runs)})" if reached and len(reached) < len(runs) else ""
            cells.append(f"{share_text(success)}; {number_text(score, 1)}{note}" if reached else "-")
        lines.append(cells)
    return table(["run", *(f"at KL {kl:g}: success %; score" for kl in EQUAL_KL)], lines)


def preference_table(found: list[dict[str, Any]]) -> str:
    """Reward-model accuracy, that of taking the longer answer, and what PPO did, a line a seed."""
    lines = []
    for run in found:
        points = smoothed(run["curve"])
        lines.append(
            [
                str(run["seed"]),
                f"{100 * run['accuracy']:.1f} ± {100 * run['accuracy_stderr']:.1f}",
                f"{100 * run['longer_accuracy']:.1f} ± {100 * run['longer_accuracy_stderr']:.1f}",
                str(run["num_pairs"]),
                f"{points[0]['score']:.2f} -> {points[-1]['score']:.2f}",
                f"{points[-1]['kl']:.2f}",
                f"{run['seconds']:.0f}",
            ]
        )
    header = ["seed", "reward model, % right ± s.e.", "longer answer, % right ± s.e.", "held-out pairs"]
    return table([*header, "PPO's score", "its KL", "its seconds"], lines)


def verdicts(results: dict[str, Any]) -> list[str]:
    """What the experiments say of the promises made of PPO, in words; only of what was run."""
    starts = {start["seed"]: start for start in results["sft"]}

    def runs_of(recipe: str) -> list[dict[str, Any]]:
        return list({row["seed"]: row for row in results["rows"] if row["recipe"] == recipe}.values())

    def gains(recipe: str) -> list[float]:
        return [run["success"] - starts[run["seed"]]["success"] for run in runs_of(recipe)]

    said = []
    if ppo := runs_of("ppo"):
        holds = min(gains("ppo")) >= NEEDED_GAIN
        kl = mean_and_spread([run["kl"] for run in ppo])[0]
        low, high = 100 * min(gains("ppo")), 100 * max(gains("ppo"))
        said.append(
            f"PPO gains {low:.1f} to {high:.1f} points over SFT at a KL of {kl:.2f}: at least 20 in every "
            f"seed, {_yes(holds)}."
        )
        best = [
            row for row in results["rows"] if row["label"].startswith("TRL PPO") and "best" in row["label"]
        ]
        if best:
            theirs = mean_and_spread([run["kl"] for run in best])[0]
            reached, ours = (share_text([run["success"] for run in runs]) for runs in (best, ppo))
            said.append(
                f"TRL's PPO at its best reaches {reached} % at a KL of {theirs:.2f}, ours {ours} % at "
                f"{kl:.2f}: the same or less KL, {_yes(kl <= theirs)}."
            )
    if runs_of("one_epoch") and runs_of("four_epochs"):
        one, four = ([run["success"] for run in runs_of(name)] for name in ("one_epoch", "four_epochs"))
        said.append(
            f"Four PPO epochs end at {share_text(four)} %, one at {share_text(one)} %; the worst seed of "
            f"four is {100 * min(gains('four_epochs')):+.1f} points from SFT."
        )
    for row in {row["label"]: row for row in results["rows"] if row["part"] == "e"}.values():
        worst = min(gains(row["recipe"]))
        said.append(
            f"Weak reward model, {row['label']}: the worst seed ends {100 * worst:+.1f} points from SFT; "
            f"never below it, {_yes(worst >= 0)}."
        )
    return said


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def markdown(results: dict[str, Any]) -> str:
    """The report: what was found, then a table a part."""
    starts = {start["seed"]: start for start in results["sft"]}
    blocks = [
        "# Learning",
        f"Seeds {', '.join(map(str, results['seeds']))}; {results['minutes']:.0f} minutes.",
    ]
    blocks += ["\n".join(f"- {line}" for line in verdicts(results))] if results["rows"] else []
    accuracies = [s["reward_accuracy"] for s in starts.values() if "reward_accuracy" in s]
    if accuracies:
        text = f"Reward model: {share_text(accuracies)} % of held-out pairs right"
        weak = [s["weak_reward_accuracy"] for s in starts.values() if "weak_reward_accuracy" in s]
        blocks.append(text + (f"; of the weak one, {share_text(weak)} %." if weak else "."))
    for part, title in PARTS.items():
        rows = [row for row in results["rows"] if row["part"] == part]
        shown = [results["skipped"][part]] if part in results["skipped"] else []
        shown += [run_table(rows, starts, weak=part == "e")] if rows else []
        if part == "d" and rows:
            shown.append("Answers of the training itself, where a run first reaches a KL:")
            shown.append(equal_kl_table(rows))
        if part == "c" and results["preferences"]:
            shown.append(preference_table(results["preferences"]))
        if shown:
            blocks += [f"## {part}. {title}", *shown]
    return "\n\n".join(blocks) + "\n"


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Write results.json, learning.md and the plots."""
    from learning_plots import plot_all

    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "learning.md").write_text(markdown(results))
    plot_all(results, folder)
