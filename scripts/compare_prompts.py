"""Which prompts a comparison asks: those that the models' runs held out, unless others are named."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dschat.errors import UserError

if TYPE_CHECKING:
    from dschat.data.comparisons import Prompt
    from dschat.data.held_out import RecordedData, SplitText


@dataclass
class Asked:
    """Prompts, and where they come from."""

    prompts: list[Prompt]
    which: str
    """In words."""
    rows: list[dict[str, Any]]
    """The data row of each, for checkers that need its columns; empty for a prompt of the command line."""
    warnings: list[str] = field(default_factory=list)


def read_prompts(args: argparse.Namespace) -> Asked:
    """The prompts to ask. Raises `UserError`, which names the line of a row without one."""
    if args.data_path is None and not args.prompt:
        asked = of_runs(args)
    else:
        asked = Asked(list(args.prompt), f"{len(args.prompt)} of --prompt", [{} for _ in args.prompt])
        if args.data_path is not None:
            add_data(asked, args)
    if not asked.prompts:
        raise UserError(f"{asked.which}: there are no prompts; give other --data-path, or --prompt.")
    number = args.num_prompts or None
    return Asked(asked.prompts[:number], asked.which, asked.rows[:number], asked.warnings)


def of_runs(args: argparse.Namespace) -> Asked:
    """The prompts that the models' runs held out. Raises `UserError` where they held out different ones."""
    from dschat.data import splits
    from dschat.data.held_out import SplitText

    records = recorded_data(args)
    if not records:
        raise UserError(
            "nothing to ask: none of the models has an arguments.json beside it that says what its run held "
            "out; give --data-path or --prompt."
        )
    (name, record), *others = records.items()
    for other, theirs in others:
        if theirs.decides != record.decides:
            raise UserError(
                f"{name} and {other} come from runs that held out different prompts ({record.place} and "
                f"{theirs.place}); say which to ask with --data-path."
            )
    text = SplitText.of_run(record)
    numbers = splits.first_of_each(text.index.keys, text.held_out())
    if args.num_prompts:  # at random, as the data may be in an order
        numbers = numbers[splits.some_rows(text.index.keys[numbers], args.num_prompts, seed=0)]
    without = [other for other in args.models if other not in records]
    warnings = [
        f"{other} has no record of its data: it may have been trained on these prompts" for other in without
    ]
    which = f"the prompts that the run of {record.place} held out"
    return Asked(text.prompts(numbers), which, rows_of(text, numbers), warnings)


def add_data(asked: Asked, args: argparse.Namespace) -> None:
    """Add the prompts of --data-path, with a warning where models were trained on them."""
    from dschat.data.held_out import SplitText

    text = SplitText.of_entries([args.data_path], "--data-path")
    numbers = text.held_out()
    asked.prompts += text.prompts(numbers)
    asked.rows += rows_of(text, numbers)
    asked.which = (
        f"{asked.which} and those of" if asked.prompts[: -len(numbers) or None] else "the prompts of"
    )
    asked.which += f" {args.data_path}"
    seen: list[list[Any]] = []
    for name, record in recorded_data(args).items():
        if record.decides in seen:
            continue
        seen.append(record.decides)
        try:
            trained = SplitText.of_run(record).num_trained_on(
                text.index.keys[numbers][: args.num_prompts or None]
            )
        except UserError as error:
            asked.warnings.append(
                f"whether {name} was trained on these prompts could not be checked: {error}"
            )
            continue
        if trained:
            asked.warnings.append(
                f"{trained} of the prompts are in the training data of {name}'s run ({record.place}): "
                "what it answers to them says little of others. Without --data-path the held-out prompts are "
                "asked."
            )


def recorded_data(args: argparse.Namespace) -> dict[str, RecordedData]:
    """What the models' runs recorded of their data, by the models' names."""
    from dschat.data.held_out import RecordedData

    found = {name: RecordedData.of(path) for name, path in args.models.items()}
    return {name: record for name, record in found.items() if record is not None}


def rows_of(text: SplitText, numbers: Any) -> list[dict[str, Any]]:
    """The data rows of comparisons."""
    return [json.loads(row) if row else {} for row in text.rows.select(numbers)["row"]]
