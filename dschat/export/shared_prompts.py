"""Prompts that a step shares with the step that trained its starting model, and warnings about them.

--data_split, --seed and --eval_fraction divide the prompts between the steps. Where they differ, the parts
of two steps overlap: a step may meet prompts that an earlier one was trained on, or had held out.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dschat.arguments import RunDescription
from dschat.data.entries import parse_entry
from dschat.data.files import is_local, user_path
from dschat.export.upstream import UpstreamModel

DIVIDING = ("data_split", "seed", "eval_fraction")
"""The flags that divide the prompts of one data set between the steps."""


def share_settings(description: RunDescription) -> dict[str, Any]:
    """The values of the flags that decide which prompts a step takes, for its manifest.

    Of the entries of --data_path it has the names of the data sets alone.
    """
    data = description.data
    return {
        "data_path": [parse_entry(entry).name for entry in data.data_path],
        "data_split": data.data_split,
        "seed": description.run.seed,
        "eval_fraction": data.eval_fraction,
    }


def overlap_warnings(description: RunDescription, models: Sequence[UpstreamModel]) -> Iterator[str]:
    """A warning for each of `models` that was trained on other shares of the data of this run.

    Step 1 gives none, as it starts from any model. Neither does a model whose manifest says nothing of data.
    """
    if description.step == "sft":
        return
    now = share_settings(description)
    for model in models:
        then = model.manifest.data if model.manifest else None
        if then is None or not any(_is_same(a, b) for a in now["data_path"] for b in then["data_path"]):
            continue
        others = [
            f"--{name} is {now[name]} and was {then[name]}"
            for name in DIVIDING
            if name in then and _meaning(name, now[name]) != _meaning(name, then[name])
        ]
        if others:
            yield (
                f"WARNING: {', '.join(others)} when {model.path} ({model.flag}) was trained on this data: it "
                "may have learned prompts of this step's share, or of its evaluation. Give every step the "
                "same values."
            )


def _is_same(now: str, then: str) -> bool:
    """Whether two names mean the same data set. A file that does not exist any more may have been moved."""
    places = [user_path(name) for name in (now, then)]
    if all(map(is_local, places)):
        return places[0].resolve() == places[1].resolve()
    return now == then or (is_local(places[0]) and places[0].name == Path(then).name)


def _meaning(name: str, value: Any) -> Any:
    """The value of a flag in a form that can be compared: shares by proportion, so that 1,2,2 is 2,4,4."""
    if name != "data_split":
        return value
    try:
        shares = [float(share) for share in str(value).split(",")]
        return [round(share / sum(shares), 6) for share in shares]
    except (ValueError, ZeroDivisionError):
        return value
