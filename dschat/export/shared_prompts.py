"""Whether a step meets prompts that the model it starts from was trained on, or that were held out there.

Prompts are shared between the steps by --data_split, --seed and --eval_fraction: other shares overlap.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dschat.arguments import RunDescription
from dschat.data.entries import parse_entry
from dschat.data.files import is_local, user_path
from dschat.export.upstream import UpstreamModel

DECIDERS = ("data_split", "seed", "eval_fraction")


def deciders(description: RunDescription) -> dict[str, Any]:
    """The flags that decide which prompts a step takes, for its manifest; of data sets, the names alone."""
    data = description.data
    return {
        "data_path": [parse_entry(entry).name for entry in data.data_path],
        "data_split": data.data_split,
        "seed": description.run.seed,
        "eval_fraction": data.eval_fraction,
    }


def other_shares(description: RunDescription, models: Sequence[UpstreamModel]) -> Iterator[str]:
    """What to warn of: the models that were trained on other shares of the same data.

    Step 1 starts from any model. A model whose manifest does not tell is not spoken of.
    """
    if description.step == "sft":
        return
    now = deciders(description)
    for model in models:
        then = model.manifest.data if model.manifest else None
        if then is None or not _share_a_set(now["data_path"], then["data_path"]):
            continue
        others = [
            f"--{name} is {now[name]} and was {then[name]}"
            for name in DECIDERS
            if name in then and _meaning(name, now[name]) != _meaning(name, then[name])
        ]
        if others:
            yield (
                f"WARNING: {', '.join(others)} when {model.path} ({model.flag}) was trained on this data: it "
                "may have learned prompts of this step's share, or of its evaluation. Give every step the "
                "same values."
            )


def _share_a_set(now: Sequence[str], then: Sequence[str]) -> bool:
    return any(_is_same(one, other) for one in now for other in then)


def _is_same(now: str, then: str) -> bool:
    """Whether two names mean the same data set; one that is not there any more may have been moved."""
    places = [user_path(name) for name in (now, then)]
    if all(map(is_local, places)):
        return places[0].resolve() == places[1].resolve()
    return now == then or (is_local(places[0]) and places[0].name == Path(then).name)


def _meaning(name: str, value: Any) -> Any:
    """Shares count by their proportions: 1,2,2 is 2,4,4."""
    if name != "data_split":
        return value
    try:
        shares = [float(share) for share in str(value).split(",")]
        return [round(share / sum(shares), 6) for share in shares]
    except (ValueError, ZeroDivisionError):
        return value
