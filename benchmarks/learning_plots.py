"""The plots of benchmarks/learning.py, as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from learning_report import PARTS, grouped, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = [*matplotlib.color_sequences["tab10"], *matplotlib.color_sequences["Dark2"]]
KL_TICKS = (0, 0.1, 0.5, 1, 2, 5, 10, 20, 50)
FAR_KL = 4
"""Beyond this KL the axis is that of its square root, so that the beginnings of runs can be told apart."""
AXES = {"success": "checked success, %", "score": "reward model's score"}
IN_TRAINING = {"success": "checked_success", "score": "score"}


def plot_all(results: dict[str, Any], folder: Path) -> None:
    """One figure a part that was run: part_a.png and so on."""
    for part in PARTS:
        rows = [row for row in results["rows"] if row["part"] == part]
        if part == "b" and rows:
            figure = plot_choices(rows, results["sft"])
        elif rows:
            figure = plot_against_kl(rows, results["sft"], weak=part == "e")
        elif part == "c" and results["preferences"]:
            figure = plot_preferences(results["preferences"])
        else:
            continue
        figure.suptitle(PARTS[part])
        figure.savefig(folder / f"part_{part}.png", dpi=130)
        plt.close(figure)


def plot_against_kl(rows: list[dict[str, Any]], starts: list[dict[str, Any]], *, weak: bool) -> plt.Figure:
    """Success and score against KL: a line a run, over its PPO steps, and a dot where it ended, held out."""
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
    for axes, name in zip(panels, AXES, strict=True):
        scale = 100 if name == "success" else 1
        for colour, (label, runs) in zip(COLOURS, grouped(rows).items(), strict=False):
            for number, run in enumerate(runs):
                points = smoothed(run["curve"])
                kls, values = [p["kl"] for p in points], [scale * p[IN_TRAINING[name]] for p in points]
                axes.plot(kls, values, color=colour, alpha=0.45, linewidth=1.2)
                axes.plot(
                    run["kl"],
                    scale * run[name],
                    "o",
                    color=colour,
                    label=None if number else label,
                    markersize=7,
                )
        level = [start["weak_score" if weak and name == "score" else name] for start in starts]
        axes.axhline(scale * sum(level) / len(level), color="grey", linestyle=":", label="SFT")
        _name_axes(axes, "KL to the SFT model, nats an answer", AXES[name])
        if max(run["kl"] for run in rows) > FAR_KL:
            axes.set_xscale("function", functions=(_signed_root, lambda x: x * np.abs(x)))
            axes.set_xticks([tick for tick in KL_TICKS if tick <= max(run["kl"] for run in rows)])
        axes.set_xlim(left=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    return figure


def plot_choices(rows: list[dict[str, Any]], starts: list[dict[str, Any]]) -> plt.Figure:
    """Held-out success and KL of each choice, a dot a seed."""
    groups = grouped(rows)
    figure, panels = plt.subplots(
        1, 2, figsize=(13, 1.2 + 0.42 * len(groups)), layout="constrained", sharey=True
    )
    for axes, name, scale in zip(panels, ("success", "kl"), (100, 1), strict=True):
        for place, runs in enumerate(groups.values()):
            values = [scale * run[name] for run in runs]
            colour = COLOURS[3] if place == 0 else COLOURS[0]
            axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.6)
            axes.plot(sum(values) / len(values), place, "|", color=colour, markersize=18, markeredgewidth=2.5)
        first = next(iter(groups.values()))
        axes.axvline(scale * sum(run[name] for run in first) / len(first), color=COLOURS[3], linewidth=0.8)
        _name_axes(
            axes, "checked success, %" if name == "success" else "KL to the SFT model, nats an answer", ""
        )
    panels[0].axvline(100 * sum(s["success"] for s in starts) / len(starts), color="grey", linestyle=":")
    panels[0].set_yticks(range(len(groups)), list(groups))
    panels[0].set_ylim(len(groups) - 0.5, -0.5)
    return figure


def plot_preferences(found: list[dict[str, Any]]) -> plt.Figure:
    """PPO's score against KL, a line a seed; reward-model accuracy beside the baseline."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for place, (colour, run) in enumerate(zip(COLOURS, found, strict=False)):
        points = smoothed(run["curve"])
        left.plot(
            [p["kl"] for p in points], [p["score"] for p in points], color=colour, label=f"seed {run['seed']}"
        )
        for shift, prefix, mark in ((-0.1, "", "o"), (0.1, "longer_", "s")):
            name = "longer answer" if prefix else "reward model"
            right.errorbar(
                place + shift,
                100 * run[f"{prefix}accuracy"],
                yerr=100 * run[f"{prefix}accuracy_stderr"],
                fmt=mark,
                color=COLOURS[1] if prefix else COLOURS[0],
                capsize=4,
                label=None if place else name,
            )
    right.axhline(50, color="grey", linestyle=":")
    right.set_xticks(range(len(found)), [f"seed {run['seed']}" for run in found])
    _name_axes(left, "KL to the SFT model, nats an answer", "reward model's score")
    _name_axes(right, "", "held-out pairs right, % (± standard error)")
    left.legend()
    right.legend()
    return figure


def _signed_root(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.sqrt(np.abs(x))


def _name_axes(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
