"""What is known of a model beside its weights, and the card (README.md) that tells it."""

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import ModelCardData

from dschat.arguments import RunDescription
from dschat.data.preparation import SplitData
from dschat.export.manifest import Head
from dschat.export.shared_prompts import deciders

CARD = "README.md"
GOLDEN_ROWS = 8
GOLDEN_TOKENS = 24
"""Enough for an average, few enough that the CPU computes them for a large model in seconds."""

LIBRARIES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "peft")
TITLES = {
    "sft": "supervised fine-tuning (step 1)",
    "reward": "reward modelling (step 2)",
    "dpo": "direct preference optimisation (DPO)",
    "rlhf": "PPO (step 3)",
    "deepspeed-chat": "conversion from DeepSpeed-Chat",
}
KINDS: dict[Head, tuple[str, str, str]] = {
    "language_model": ("A causal language model", "AutoModelForCausalLM", "text-generation"),
    "score": (
        "A reward model: one score for a prompt with its answer",
        "AutoModelForSequenceClassification",
        "text-classification",
    ),
    "value": (
        "The critic of PPO: the value of what has been written so far",
        "AutoModelForSequenceClassification",
        "text-classification",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a model comes from: what its files cannot tell."""

    step: str
    """sft, reward, dpo, rlhf, or deepspeed-chat for a converted model."""
    base_model: str
    golden_inputs: list[list[int]]
    """Rows of token ids on which the model's outputs are promised."""
    head: Head | None = None
    """None where the model tells its own."""
    figures: dict[str, Any] = field(default_factory=dict)
    """The final metrics; a reward model's score_mean and score_std go into its manifest."""
    verdict: str | None = None
    """On a reward model (dschat/export/verdict.py); it goes into its manifest too."""
    data: dict[str, Any] | None = None
    """What decides which prompts it was trained on; it goes into its manifest."""
    flags: dict[str, Any] = field(default_factory=dict)
    num_rows: dict[str, int] = field(default_factory=dict)
    """Rows of each source of data,"""
    num_used: dict[str, int] = field(default_factory=dict)
    """and of each part that this step took of them."""


def step_provenance(
    description: RunDescription,
    base_model: str,
    data: SplitData,
    figures: dict[str, Any],
    *,
    head: Head | None = None,
    verdict: str | None = None,
) -> Provenance:
    """The provenance of a model that a run trained from `base_model` and that has these final `figures`."""
    return Provenance(
        step=description.step,
        base_model=base_model,
        golden_inputs=golden_rows(data.train),
        head=head,
        figures=figures,
        verdict=verdict,
        data=deciders(description),
        flags=description.changed_flags(),
        num_rows=data.num_rows,
        num_used={"training": len(data.train), "evaluation": len(data.evaluation)},
    )


def golden_rows(rows: Dataset) -> list[list[int]]:
    """The ends of the first rows of a step's data: up to 8 rows of 2 to 24 token ids."""
    names = [name for name in ("input_ids", "chosen_ids", "rejected_ids") if name in rows.column_names]
    first = rows.select_columns(names)[:GOLDEN_ROWS]
    ids: Sequence[list[int]] = [row for together in zip(*first.values(), strict=True) for row in together]
    return [list(row[-GOLDEN_TOKENS:]) for row in ids if len(row) > 1][:GOLDEN_ROWS]


def model_card(provenance: Provenance, head: Head, folder: str) -> str:
    """The card of a model in `folder`: Markdown under the YAML that the hub reads."""
    kind, auto_class, task = KINDS[head]
    is_on_hub = not Path(provenance.base_model).exists() and provenance.base_model.count("/") <= 1
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=["dschat", provenance.step, head],
        base_model=provenance.base_model if is_on_hub else None,
    )
    name = Path(folder).name or head
    used = ", ".join(f"{number} rows for {part}" for part, number in provenance.num_used.items())
    sections = [
        f"# {name}\n\n{kind}, made by {TITLES[provenance.step]} from `{provenance.base_model}` "
        f"with dschat on {datetime.now(UTC).date()}.",
        f'```python\nmodel = transformers.{auto_class}.from_pretrained({folder!r}, dtype="auto")\n```',
        f"## Verdict\n\n{provenance.verdict}" if provenance.verdict else "",
        _table("Data", ("source", "rows"), provenance.num_rows) + (f"\n\nOf these: {used}." if used else ""),
        _table("Flags that are not at their defaults", ("flag", "value"), _named(provenance.flags)),
        _table("Final metrics", ("metric", "value"), provenance.figures),
        _table("Versions", ("library", "version"), {"python": platform.python_version(), **_versions()}),
    ]
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def _named(flags: dict[str, Any]) -> dict[str, Any]:
    return {f"`--{name}`": value for name, value in flags.items()}


def _table(title: str, header: tuple[str, str], rows: dict[str, Any]) -> str:
    """A section with a table, empty without rows."""
    if not rows:
        return ""
    lines = [f"| {_shown(name)} | {_shown(value)} |" for name, value in rows.items()]
    return "\n".join([f"## {title}\n", f"| {header[0]} | {header[1]} |", "|---|---|", *lines])


def _shown(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        value = " ".join(map(str, value))
    return str(value).replace("|", "\\|").replace("\n", "\\n")


def _versions() -> dict[str, str]:
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:  # one that this installation does without
            continue
    return versions
