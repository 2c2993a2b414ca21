"""The model card: README.md beside the weights, which says what a model is and how it was made."""

import math
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import PreTrainedTokenizerBase

from dschat.export.manifest import Head
from dschat.export.provenance import Provenance
from dschat.export.snippets import adapter_snippet, snippet
from dschat.runs.started import installed_versions

CARD = "README.md"
"""The name of the file in a model's folder."""

LIBRARIES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "peft")
"""The libraries whose versions a card lists."""

TITLES = {
    "sft": "supervised fine-tuning (step 1)",
    "reward": "reward modelling (step 2)",
    "dpo": "direct preference optimisation (DPO)",
    "rlhf": "PPO (step 3)",
    "deepspeed-chat": "conversion from DeepSpeed-Chat",
    "trl-valuehead": "conversion from TRL",
}
"""The steps in words, by their names in a `Provenance`."""

KINDS: dict[Head, tuple[str, str]] = {
    "language_model": ("A causal language model", "text-generation"),
    "score": ("A reward model: one score for a prompt with its answer", "text-classification"),
    "value": ("The critic of PPO: the value of what has been written so far", "text-classification"),
}
"""By head: a model in words, and its task on the hub."""


def model_card(
    provenance: Provenance,
    head: Head,
    folder: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    has_adapter: bool = False,
) -> str:
    """The card of a model in `folder`: Markdown under the YAML that the hub reads."""
    kind, task = KINDS[head]
    is_on_hub = not Path(provenance.base_model).exists() and provenance.base_model.count("/") <= 1
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=["dschat", provenance.step, head],
        base_model=provenance.base_model if is_on_hub else None,
    )
    name = Path(folder).name or head
    used = ", ".join(f"{number} rows for {part}" for part, number in provenance.num_used.items())
    versions = {"python": platform.python_version(), **installed_versions(LIBRARIES)}
    sections = [
        f"# {name}\n\n{kind}, made by {TITLES[provenance.step]} from `{provenance.base_model}` "
        f"with dschat on {datetime.now(UTC).date()}.",
        f"```python\n{snippet(head, folder, tokenizer)}\n```",
        f"## The adapter alone\n\n`adapter/` holds what LoRA trained. In place of the line of `model` above:"
        f"\n\n```python\n{adapter_snippet(head, provenance.base_model)}\n```"
        if has_adapter
        else "",
        f"## Verdict\n\n{provenance.verdict}" if provenance.verdict else "",
        _table("Data", ("source", "rows"), provenance.num_rows) + (f"\n\nOf these: {used}." if used else ""),
        _table("Flags that are not at their defaults", ("flag", "value"), _named(provenance.flags)),
        _table("Final metrics", ("metric", "value"), provenance.metrics),
        _table("Versions", ("library", "version"), versions),
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
