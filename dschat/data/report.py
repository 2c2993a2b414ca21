"""Report of a step's data: a line per source, one for training and one for evaluation."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dschat.data import splits
from dschat.data.comparisons import ComparisonIndex
from dschat.data.findings import Findings
from dschat.data.share import Task
from dschat.data.sources import Source
from dschat.data.tokenization import Tokenized, column

if TYPE_CHECKING:
    from datasets import Dataset

REASONS = {
    splits.REPEATED: "prompt of --data_path",
    splits.ALSO_EVALUATION: "prompt in an evaluation split",
    splits.OUTWEIGHED: "over its weight in the blend",
}
"""Why a comparison's prompt is in no part."""


def source_report(
    number: int, index: ComparisonIndex, first: np.ndarray, parts: np.ndarray, findings: Findings, task: Task
) -> dict[str, Any]:
    """Counts of what became of one source's rows, for `report.json`.

    `first` are the parts as `splits.assign` gives them, of each prompt's first comparison alone; `parts`
    those of the prompts, as `splits.parts_of_prompts` gives them; `findings` are of reading the source.
    """
    mine = index.sources == number
    repeats = mine & task.repeats(index, parts)
    counts = {task.what_repeats: repeats}
    counts |= {reason: mine & (parts == part) for part, reason in REASONS.items()}
    reasons = {reason: int(rows.sum()) for reason, rows in counts.items() if rows.any()}
    return {
        "rows": int(mine.sum()) + findings.num_left_out,
        "further": int(np.sum(mine & (parts >= 0) & (first < 0) & ~repeats)),
        "dropped": {**findings.dropped, **reasons},
        "findings": findings.as_json(),
        "shares": [int(np.sum(mine & (first == step))) for step in range(splits.NUM_STEPS)],
        "evaluation": int(np.sum(mine & (first == splits.EVALUATION))),
    }


def num_related(families: np.ndarray, first: np.ndarray) -> int:
    """Number of evaluation prompts in the family of a training prompt; `first` as for `source_report`."""
    training = (first >= 0) & (first < splits.NUM_STEPS)
    return int(np.isin(families[first == splits.EVALUATION], families[training]).sum())


def rows_report(tokenized: Tokenized, left_out: Mapping[str, int]) -> dict[str, Any]:
    """Counts of what became of the rows of training, or of evaluation, for `report.json`."""
    lengths = column(tokenized.rows, "length")
    return {
        "rows": len(lengths),
        "mean_length": float(lengths.mean()) if len(lengths) else 0.0,
        "fewer_turns": tokenized.num_fewer_turns,
        "cut": tokenized.num_cut,
        "dropped": dict(left_out),
        "unshown": tokenized.unshown,
    }


def columns_of(rows: "Dataset") -> set[str]:
    """Names of the columns of all data rows that stand beside the prompts."""
    tables = rows.select_columns(["row"]).with_format("arrow").iter(1000)
    return {name for table in tables for row in table["row"].to_pylist() for name in json.loads(row)}


def describe(report: dict[str, Any], task: Task, sources: Sequence[Source], folder: Path) -> str:
    """The report as text: a line per source, with its findings, and two for the step."""
    lines = [f"data of step {task.step} (tokens kept in {folder})"]
    for source, counts in zip(sources, report["sources"], strict=True):
        shares = " + ".join(map(str, counts["shares"]))
        lines.append(
            f"  {source.name}: {counts['rows']} rows; {shares} prompts for steps 1 + 2 + 3"
            f" and {counts['evaluation']} for evaluation"
            + (f"; {counts['further']} rows repeat one of these prompts" if counts["further"] else "")
            + listed("; dropped", counts["dropped"])
            + (f"; split {source.splits}" if source.splits else "")
            + (f"; not used: {', '.join(source.unused)}" if source.unused else "")
        )
        lines += [f"    {line}" for line in Findings.of_json(counts["findings"]).lines()]
    for name in ("train", "evaluation"):
        counts = report[name]
        lines.append(
            f"  {name}: {counts['rows']} rows of {counts['mean_length']:.0f} tokens on average"
            + (f", {counts['fewer_turns']} without their first turns" if counts["fewer_turns"] else "")
            + (f", {counts['cut']} cut in their text to {task.limit}" if counts["cut"] else "")
            + listed("; dropped", counts["dropped"])
            + (f"; {both} pairs are labelled both ways" if (both := counts.get("contradictions")) else "")
            + listed("; not shown by the chat template:", counts["unshown"])
            + ("; --num_train_epochs counts passes over them" if name == "train" else "")
        )
        if "refused" in counts:
            lines.append(f"    the first that tokenizer or template refuse: {counts['refused']}")
    if report["related"]:
        lines.append(
            f"  {report['related']} prompts for evaluation begin a training dialogue or go on from one"
        )
    return "\n".join(lines)


def listed(intro: str, counts: Mapping[str, int]) -> str:
    """`intro` and each count with its reason; "" without counts."""
    return (
        f"{intro} " + ", ".join(f"{number} ({reason})" for reason, number in counts.items()) if counts else ""
    )
