"""From --data_path to one step's token ids: read, de-duplicate, split, tokenise, keep.

Called on every rank before the process group exists; the first to come does the work (`dschat.data.cache`).
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import (
    Dataset,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    load_from_disk,
)
from transformers import PreTrainedTokenizerBase

from dschat.arguments import DataArguments
from dschat.data import splits
from dschat.data.cache import cache_folder, cached, fingerprint
from dschat.data.comparisons import Comparison, ComparisonIndex, write_comparisons
from dschat.data.sources import Source, open_source, read_comparisons
from dschat.data.tokenization import (
    Tokenized,
    column,
    default_num_proc,
    tokenize_pairs,
    tokenize_prompts,
    tokenize_sft,
    tokenizer_fingerprint,
)
from dschat.errors import UserError

FORMAT = 1
"""Raise it when code changes what the same input becomes, lest old results be taken for new ones."""

REASONS = {splits.REPEATED: "repeated prompt", splits.ALSO_EVALUATION: "prompt in an evaluation split"}
"""Why a comparison is in no part."""


@dataclass(frozen=True)
class SplitData:
    """Token ids of one step, on disk and memory-mapped. `evaluation` may be empty."""

    train: Dataset
    evaluation: Dataset


@dataclass(frozen=True)
class _Task:
    """What one step wants done with its comparisons."""

    step: int
    """1, 2 or 3."""
    tokenize: Callable[..., Tokenized]
    limit: str
    """The flag that bounds a prompt's length,"""
    max_tokens: int
    """and its value."""
    settings: dict[str, Any]
    """What shapes the tokens beside the text and the tokenizer."""


def sft_data(
    data: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_len: int,
    seed: int,
    train_on_prompt: bool = False,
    sft_only_data_path: Sequence[str] = (),
) -> SplitData:
    """Step 1's rows, as `tokenize_sft` makes them, of its share and of `sft_only_data_path`.

    Raises `UserError` for input that cannot be read and where nothing is left to train on.
    """
    settings = {"max_seq_len": max_seq_len, "train_on_prompt": train_on_prompt}
    tokenize = partial(tokenize_sft, tokenizer=tokenizer, **settings)
    task = _Task(1, tokenize, "--max_seq_len", max_seq_len, settings)
    return _prepare(task, data, tokenizer, seed, sft_only_data_path)


def reward_data(
    data: DataArguments, tokenizer: PreTrainedTokenizerBase, *, max_seq_len: int, seed: int
) -> SplitData:
    """Step 2's pairs, as `tokenize_pairs` makes them. Raises `UserError` as `sft_data` does."""
    settings = {"max_seq_len": max_seq_len}
    tokenize = partial(tokenize_pairs, tokenizer=tokenizer, **settings)
    task = _Task(2, tokenize, "--max_seq_len", max_seq_len, settings)
    return _prepare(task, data, tokenizer, seed)


def prompt_data(
    data: DataArguments, tokenizer: PreTrainedTokenizerBase, *, max_prompt_seq_len: int, seed: int
) -> SplitData:
    """Step 3's prompts, as `tokenize_prompts` makes them. Raises `UserError` as `sft_data` does."""
    settings = {"max_prompt_seq_len": max_prompt_seq_len}
    tokenize = partial(tokenize_prompts, tokenizer=tokenizer, **settings)
    task = _Task(3, tokenize, "--max_prompt_seq_len", max_prompt_seq_len, settings)
    return _prepare(task, data, tokenizer, seed)


def _prepare(
    task: _Task,
    data: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    own_data_path: Sequence[str] = (),
) -> SplitData:
    sources = [open_source(entry) for entry in data.data_path]
    own = [open_source(entry, "--sft_only_data_path") for entry in own_data_path]
    key = fingerprint(
        {
            "format": FORMAT,
            "step": task.step,
            "settings": task.settings,
            "sources": [source.fingerprint for source in sources],
            "own": [source.fingerprint for source in own],
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "shares": data.shares,
            "eval_fraction": data.eval_fraction,
            "seed": seed,
        }
    )
    folder = cached(
        cache_folder(data.data_output_path), key, lambda place: _build(place, task, data, seed, sources, own)
    )
    if int(os.environ.get("RANK", 0)) == 0:
        report = json.loads((folder / "report.json").read_text())
        print(_describe(report, task, [*sources, *own], folder), flush=True)
    return SplitData(load_from_disk(str(folder / "train")), load_from_disk(str(folder / "evaluation")))


def _build(
    folder: Path, task: _Task, data: DataArguments, seed: int, sources: list[Source], own: list[Source]
) -> None:
    """Fill the folder with train/, evaluation/ (saved by `datasets`) and report.json."""
    text = folder / "comparisons.arrow"
    dropped = [Counter() for _ in [*sources, *own]]
    index = write_comparisons(_all_comparisons([*sources, *own], dropped), text)
    parts = _assign(index, len(sources), data, seed)
    _check_sources([*sources, *own], index)
    _check_share(parts, task, data)
    rows = Dataset.from_file(str(text))
    num_proc = data.preprocessing_num_workers or default_num_proc()
    report = {
        "sources": [_source_report(number, index, parts, drops) for number, drops in enumerate(dropped)]
    }
    for name, part in (("train", task.step - 1), ("evaluation", splits.EVALUATION)):
        tokenized = task.tokenize(rows.select(np.flatnonzero(parts == part)), num_proc=num_proc)
        if name == "train":
            _check_rows_left(tokenized, task)
        with _without_progress_bar():
            # By itself `datasets` gives no rows no file, and cannot load that.
            tokenized.rows.save_to_disk(str(folder / name), num_shards=None if len(tokenized.rows) else 1)
        report[name] = _rows_report(tokenized)
    text.unlink()
    for scratch in folder.glob("cache-*.arrow"):
        scratch.unlink()
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """For work that is quick beside tokenisation, which has a bar."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _all_comparisons(sources: list[Source], dropped: list[Counter]) -> Iterator[tuple[Comparison, int, bool]]:
    """Every comparison of every source, with the source's number and whether it is for evaluation."""
    for number, source in enumerate(sources):
        for comparison in read_comparisons(source.training, dropped[number]):
            yield comparison, number, False
        if source.evaluation is not None:
            for comparison in read_comparisons(source.evaluation, dropped[number]):
                yield comparison, number, True


def _assign(index: ComparisonIndex, num_shared: int, data: DataArguments, seed: int) -> np.ndarray:
    """The part of each comparison, as `splits.assign` numbers them.

    Sources from `num_shared` on are step 1's own. The other steps do not know them, so they must not change
    the split of the shared ones: they give up prompts that those have, in any step.
    """
    shared = index.sources < num_shared
    own = ~shared & ~np.isin(index.keys, index.keys[shared])
    parts = np.full(len(shared), splits.REPEATED, dtype=np.int8)
    for rows, shares in ((shared, data.shares), (own, (1.0, 0.0, 0.0))):
        parts[rows] = splits.assign(
            index.keys[rows],
            index.sources[rows],
            index.in_evaluation[rows],
            eval_fraction=data.eval_fraction,
            shares=shares,
            seed=seed,
        )
    return parts


def _check_sources(sources: list[Source], index: ComparisonIndex) -> None:
    """Raise `UserError` for a source without rows to train on."""
    for number, source in enumerate(sources):
        if not np.any((index.sources == number) & ~index.in_evaluation):
            problem = f"{source.flag} {source.name} holds no rows to train on"
            raise UserError(f"{problem}; leave it out or give another file.")


def _check_share(parts: np.ndarray, task: _Task, data: DataArguments) -> None:
    """Raise `UserError` where the split leaves the step nothing to train on."""
    sizes = np.bincount(parts[(parts >= 0) & (parts < splits.NUM_STEPS)], minlength=splits.NUM_STEPS)
    if sizes[task.step - 1] == 0:
        cut = ", ".join(map(str, sizes))
        raise UserError(
            f"step {task.step} has no prompts to train on: --data_split {data.data_split} cuts the "
            f"{sizes.sum()} training prompts into {cut}. Give step {task.step} a larger share, or give more "
            "data with --data_path."
        )


def _check_rows_left(tokenized: Tokenized, task: _Task) -> None:
    """Raise `UserError` where tokenisation dropped every training row."""
    if len(tokenized.rows) == 0:
        problem = f"step {task.step} has no rows left to train on" + _listed(": dropped", tokenized.dropped)
        raise UserError(
            f"{problem}. {task.limit} is {task.max_tokens} and the shortest prompt has "
            f"{tokenized.shortest_prompt} tokens: raise it, or give other data."
        )


def _source_report(
    number: int, index: ComparisonIndex, parts: np.ndarray, dropped: Counter[str]
) -> dict[str, Any]:
    parts = parts[index.sources == number]
    reasons = dict(dropped)
    for part, reason in REASONS.items():
        if np.any(parts == part):
            reasons[reason] = int(np.sum(parts == part))
    return {
        "rows": len(parts) + sum(dropped.values()),
        "dropped": reasons,
        "shares": [int(np.sum(parts == step)) for step in range(splits.NUM_STEPS)],
        "evaluation": int(np.sum(parts == splits.EVALUATION)),
    }


def _rows_report(tokenized: Tokenized) -> dict[str, Any]:
    lengths = column(tokenized.rows, "length")
    return {
        "rows": len(lengths),
        "mean_length": float(lengths.mean()) if len(lengths) else 0.0,
        "cut": tokenized.num_cut,
        "dropped": tokenized.dropped,
    }


def _describe(report: dict[str, Any], task: _Task, sources: list[Source], folder: Path) -> str:
    """What became of the data, a line a source and two for the step."""
    lines = [f"data of step {task.step} (tokens kept in {folder})"]
    for source, counts in zip(sources, report["sources"], strict=True):
        shares = " + ".join(map(str, counts["shares"]))
        lines.append(
            f"  {source.name}: {counts['rows']} rows; {shares} for steps 1 + 2 + 3"
            f" and {counts['evaluation']} for evaluation"
            + _listed("; dropped", counts["dropped"])
            + (f"; splits not used: {', '.join(source.unused)}" if source.unused else "")
        )
    for name in ("train", "evaluation"):
        counts = report[name]
        lines.append(
            f"  {name}: {counts['rows']} rows of {counts['mean_length']:.0f} tokens on average"
            + (f", {counts['cut']} of them cut to {task.limit}" if counts["cut"] else "")
            + _listed("; dropped", counts["dropped"])
        )
    return "\n".join(lines)


def _listed(intro: str, counts: dict[str, int]) -> str:
    return (
        f"{intro} " + ", ".join(f"{number} ({reason})" for reason, number in counts.items()) if counts else ""
    )
