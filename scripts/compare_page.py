"""A comparison as a page."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import numpy as np

from dschat.reports.page import Block, Plot, Plots, Samples, Section, Table, Text, Verdict, Warnings, page
from dschat.reports.plots import label, plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from scripts.compare import Comparison


def as_page(args: argparse.Namespace, found: Comparison) -> str:
    """The HTML: verdicts, the table, scores and lengths as plots, answers side by side."""
    from scripts.compare import NUM_ON_PAGE, as_text, cells, headings

    shown = headings(args, found)
    by_model = [cells(values, shown) for values in found.figures.values()]
    rows = list(zip((heading for heading, _ in shown.values()), *by_model, strict=True))
    blocks: list[Block] = []
    for sentence, level in found.verdicts:
        words, _, reason = sentence.partition(": ")
        blocks.append(Verdict(words, reason, level))  # type: ignore[arg-type]  # one of the levels
    if not found.verdicts:
        blocks.append(
            Text("Nothing scores these answers: give --reward-model, --reward-function or --judge.")
        )
    blocks.append(Warnings(found.asked.warnings))
    blocks.append(Table(rows, columns=("", *found.figures)))
    blocks += [Text(note, faint=True) for note in found.notes]
    plots = score_plots(found)
    if plots:
        blocks.append(Section("Scores", [Plots(plots)]))
    samples = []
    for row, prompt in enumerate(found.asked.prompts[:NUM_ON_PAGE]):
        texts = [(name, texts[row], score_note(found, name, row)) for name, texts in found.answers.items()]
        samples.append(Samples(f"Prompt {row + 1}", as_text(prompt).strip(), texts))
    blocks.append(Section("Answers side by side", samples))
    sampled = "greedy" if args.greedy else f"temperature {args.temperature:g}, seed {args.seed}"
    truncated = "" if args.top_p == 1 else f", top-p {args.top_p:g}"
    truncated += "" if args.top_k == 0 else f", top-k {args.top_k}"
    lead = f"{len(found.asked.prompts)} prompts: {found.asked.which}; {sampled}{truncated}, at most "
    lead += f"{args.max_answer_seq_len} tokens. Intervals are of 95 %."
    return page(f"{', '.join(found.answers)}: answers compared", blocks, lead=lead)


def score_note(found: Comparison, name: str, row: int) -> str:
    """What the sources make of an answer."""
    parts = [f"{source} {scores[name][row]:.3g}" for source, scores in found.scores.items()]
    words = {1.0: "wins", 0.5: "ties", 0.0: "loses"}
    if "judge" in found.wins and name in found.wins["judge"]:
        parts.append(f"{words[float(found.wins['judge'][name][row])]} by the judge")
    return ", ".join(parts)


def score_plots(found: Comparison) -> list[Plot]:
    """The distribution of each source's scores over the models."""

    def histogram(source: str) -> Plot:
        scores = {name: values[~np.isnan(values)] for name, values in found.scores[source].items()}
        edges = np.histogram_bin_edges(np.concatenate(list(scores.values())), 24).tolist()

        def draw(axes: Axes) -> None:
            for name, values in scores.items():
                axes.hist(values, edges, alpha=0.45, label=label(name))

        return plot(f"Scores by {source}", draw, x="score", y="answers", legend=True)

    return [histogram(source) for source in found.scores]
