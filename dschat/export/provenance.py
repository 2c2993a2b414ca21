"""The origin of an exported model, which its manifest and its card record."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dschat.arguments import RunDescription
from dschat.data.preparation import SplitData
from dschat.data.rows import Rows
from dschat.export.manifest import Head
from dschat.export.shared_prompts import share_settings

GOLDEN_ROWS = 8
"""Rows on which outputs are promised: few enough that a CPU computes them for a large model in seconds."""

GOLDEN_TOKENS = 24
"""The longest such row in tokens: enough for an average."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The origin of a model: what its files alone do not say."""

    step: str
    """sft, reward, dpo, rlhf, or deepspeed-chat for a converted model."""
    base_model: str
    """Folder or hub id of the model from which training started."""
    golden_inputs: list[list[int]]
    """Rows of token ids on which the model's outputs are promised."""
    head: Head | None = None
    """None where the class of the model decides, see `golden_outputs.head_of`."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """The final metrics; a reward model's score_mean and score_std go into its manifest."""
    verdict: str | None = None
    """The verdict on a reward model or on PPO, in words; a reward model's goes into its manifest too."""
    data: dict[str, Any] | None = None
    """The settings that decide which prompts the model was trained on, for its manifest."""
    flags: dict[str, Any] = field(default_factory=dict)
    """Values of the flags that are not at their defaults, by name."""
    num_rows: dict[str, int] = field(default_factory=dict)
    """Rows in each source of data, by its name."""
    num_used: dict[str, int] = field(default_factory=dict)
    """Rows that the step used for training and for evaluation, by purpose."""


def step_provenance(
    description: RunDescription,
    base_model: str,
    data: SplitData,
    metrics: dict[str, Any],
    *,
    head: Head | None = None,
    verdict: str | None = None,
) -> Provenance:
    """The provenance of a model that a run trained from `base_model` and that has these final `metrics`."""
    return Provenance(
        step=description.step,
        base_model=base_model,
        golden_inputs=golden_rows(data.train),
        head=head,
        metrics=metrics,
        verdict=verdict,
        data=share_settings(description),
        flags=description.changed_flags(),
        num_rows=data.num_rows,
        num_used={"training": len(data.train), "evaluation": len(data.evaluation)},
    )


def golden_rows(rows: Rows) -> list[list[int]]:
    """The rows of token ids on which outputs are promised: the last 24 ids of the first 8 rows of `rows`.

    Rows of one token are left out. `rows` may have the columns of any step.
    """
    names = [name for name in ("input_ids", "chosen_ids", "rejected_ids") if name in rows.table.column_names]
    first = rows.table.select(names).slice(0, GOLDEN_ROWS).to_pydict()
    ids: Sequence[list[int]] = [row for together in zip(*first.values(), strict=True) for row in together]
    return [list(row[-GOLDEN_TOKENS:]) for row in ids if len(row) > 1][:GOLDEN_ROWS]
