"""From --data_path to one step's token ids: read, de-duplicate, split, tokenise, keep.

Called on every rank before the process group exists; the first to come does the work (`dschat.data.cache`).
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import (
    Dataset,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    load_from_disk,
)
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dschat.arguments import DataArguments
from dschat.data import splits
from dschat.data.cache import cache_folder, cached, fingerprint
from dschat.data.comparisons import Comparison, ComparisonIndex, write_comparisons
from dschat.data.files import Rows
from dschat.data.sources import Format, Source, open_source, read_comparisons, read_rows
from dschat.data.tokenization import (
    RowError,
    Tokenized,
    column,
    default_num_proc,
    tokenize_pairs,
    tokenize_prompts,
    tokenize_sft,
    tokenizer_fingerprint,
)
from dschat.errors import UserError

FORMAT = 6
"""Raise it when code changes what the same input becomes, lest old results be taken for new ones."""

REASONS = {
    splits.REPEATED: "repeated prompt",
    splits.ALSO_EVALUATION: "prompt in an evaluation split",
    splits.OUTWEIGHED: "over its weight in the blend",
}
"""Why a comparison is in no part."""


@dataclass(frozen=True)
class SplitData:
    """Token ids of one step, on disk and memory-mapped. `evaluation` may be empty."""

    train: Dataset
    evaluation: Dataset
    num_rows: dict[str, int]
    """Rows of each source, those included that were dropped or went to other steps."""
    key: str
    """The fingerprint of all that shaped the rows and their order."""
    columns: tuple[str, ...] = ()
    """The columns of the data rows, where those are kept."""


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
    keep_rows: bool = False
    """Whether the data rows stand beside the tokens."""
    lacks: str = ""
    """What a row that the step cannot use lacks."""

    def can_use(self, index: ComparisonIndex) -> np.ndarray:
        """Which comparisons the step can use, bool [N]: those with an answer, with a pair, or all."""
        return {1: index.num_answers > 0, 2: index.num_pairs > 0}.get(self.step, index.num_answers >= 0)


@dataclass(frozen=True)
class _Sources:
    """The opened data sets, in the order in which their comparisons are numbered."""

    shared: list[Source]
    """--data_path, which all steps know."""
    evaluation: list[Source]
    """--eval_data_path."""
    own: list[Source]
    """Step 1's own."""

    @property
    def all(self) -> list[Source]:
        """Every source; its place is its number."""
        return [*self.shared, *self.evaluation, *self.own]

    def are_for_evaluation(self, number: int) -> bool:
        """Whether the source of that number is one of --eval_data_path."""
        return len(self.shared) <= number < len(self.shared) + len(self.evaluation)

    @staticmethod
    def open(data: DataArguments, own_data_path: Sequence[str]) -> "_Sources":
        """Open them all. Raises `UserError`."""
        return _Sources(
            [open_source(entry) for entry in data.data_path],
            [open_source(entry, "--eval_data_path") for entry in data.eval_data_path],
            [open_source(entry, "--sft_only_data_path") for entry in own_data_path],
        )


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
    task = _Task(1, tokenize, "--max_seq_len", max_seq_len, settings, lacks="no answer to learn")
    return _prepare(task, data, tokenizer, seed, sft_only_data_path)


def reward_data(
    data: DataArguments, tokenizer: PreTrainedTokenizerBase, *, max_seq_len: int, seed: int
) -> SplitData:
    """Step 2's pairs, as `tokenize_pairs` makes them; the pairs of one prompt weigh 1 together.

    Raises `UserError` as `sft_data` does.
    """
    settings = {"max_seq_len": max_seq_len}
    tokenize = partial(tokenize_pairs, tokenizer=tokenizer, **settings)
    task = _Task(2, tokenize, "--max_seq_len", max_seq_len, settings, lacks="no two answers to compare")
    return _prepare(task, data, tokenizer, seed)


def prompt_data(
    data: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_seq_len: int,
    seed: int,
    reader: PreTrainedTokenizerBase | None = None,
    keep_rows: bool = False,
) -> SplitData:
    """Step 3's prompts, as `tokenize_prompts` makes them. Raises `UserError` as `sft_data` does."""
    settings = {"max_prompt_seq_len": max_prompt_seq_len}
    tokenize = partial(tokenize_prompts, tokenizer=tokenizer, reader=reader, keep_rows=keep_rows, **settings)
    if reader is not None:
        settings["reader"] = _text_fingerprint(reader)
    if keep_rows:
        settings["keep_rows"] = True
    task = _Task(3, tokenize, "--max_prompt_seq_len", max_prompt_seq_len, settings, keep_rows=keep_rows)
    return _prepare(task, data, tokenizer, seed)


def _text_fingerprint(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """What decides the tokens of a conversation."""
    return [tokenizer_fingerprint(tokenizer), tokenizer.chat_template]


def _prepare(
    task: _Task,
    data: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    own_data_path: Sequence[str] = (),
) -> SplitData:
    sources = _Sources.open(data, own_data_path)
    form = replace(Format.of(data), keep_rows=task.keep_rows)

    def identities(some: list[Source]) -> list[list]:
        return [[s.fingerprint, s.weight, s.read and s.read.__name__] for s in some]

    key = fingerprint(
        {
            "format": FORMAT,
            "step": task.step,
            "settings": task.settings,
            "sources": identities(sources.shared),
            "evaluation": identities(sources.evaluation),
            "own": identities(sources.own),
            "form": [form.name, form.keys],
            "tokenizer": _text_fingerprint(tokenizer),
            "shares": data.shares,
            "eval_fraction": data.eval_fraction,
            "max_train_samples": data.max_train_samples,
            "seed": seed,
        }
    )
    folder = cached(
        cache_folder(data.data_output_path),
        key,
        lambda place: _build(place, task, data, seed, sources, form),
    )
    try:
        report = json.loads((folder / "report.json").read_text())
        train, evaluation = (load_from_disk(str(folder / name)) for name in ("train", "evaluation"))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(
            f"the tokens kept in {folder} cannot be read ({error}); remove that folder."
        ) from error
    if int(os.environ.get("RANK", 0)) == 0:
        print(_describe(report, task, sources.all, folder), flush=True)
    counts = zip(sources.all, report["sources"], strict=True)
    num_rows = {source.name: count["rows"] for source, count in counts}
    return SplitData(train, evaluation, num_rows, key, tuple(report.get("columns", ())))


def _build(
    folder: Path, task: _Task, data: DataArguments, seed: int, sources: _Sources, form: Format
) -> None:
    """Fill the folder with train/, evaluation/ (saved by `datasets`) and report.json."""
    text = folder / "comparisons.arrow"
    dropped = [Counter() for _ in sources.all]
    comparisons = _all_comparisons(sources, form, dropped)
    bar = tqdm(comparisons, desc="reading", unit=" rows", delay=2, disable=are_progress_bars_disabled())
    index = write_comparisons(bar, text)
    parts = _assign(index, sources, data, seed)
    _check_sources(sources, index, dropped)
    _check_share(parts, task, data)
    rows = Dataset.from_file(str(text))
    report = {
        "sources": [_source_report(number, index, parts, drops, task) for number, drops in enumerate(dropped)]
    }
    for name, part in (("train", task.step - 1), ("evaluation", splits.EVALUATION)):
        chosen, left_out = _rows_of(part, index, parts, task)
        if name == "train" and data.max_train_samples is not None:
            left_out["over --max_train_samples"] = max(len(chosen) - data.max_train_samples, 0)
            chosen = chosen[splits.some_rows(index.row_keys[chosen], data.max_train_samples, seed)]
        try:
            tokenized = _tokenized(rows.select(chosen), index, chosen, task, data)
        except RowError as error:
            place = _place_of(int(chosen[error.number]), sources, form)
            raise UserError(f"{place}: {error.reason} Correct the row or remove it.") from error
        left_out.update(tokenized.dropped)
        if name == "train":
            _check_rows_left(tokenized, left_out, task)
        with _without_progress_bar():
            # By itself `datasets` gives no rows no file, and cannot load that.
            tokenized.rows.save_to_disk(str(folder / name), num_shards=None if len(tokenized.rows) else 1)
        report[name] = _rows_report(tokenized, +left_out)
        if task.keep_rows:
            report["columns"] = sorted({*report.get("columns", ()), *_columns_of(tokenized.rows)})
    text.unlink()
    for scratch in folder.glob("cache-*.arrow"):
        scratch.unlink()
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")


def _rows_of(
    part: int, index: ComparisonIndex, parts: np.ndarray, task: _Task
) -> tuple[np.ndarray, Counter[str]]:
    """The comparisons of a part that the step uses, ascending, and why prompts of it are left out.

    Steps 1 and 3 take a prompt once, step 2 takes every different row of it.
    """
    mine = splits.parts_of_prompts(index.keys, index.in_evaluation, parts) == part
    usable = mine & task.can_use(index)
    identity = index.row_keys if task.step == 2 else index.keys
    num_unusable = len(np.setdiff1d(index.keys[mine], index.keys[usable]))
    return splits.first_of_each(identity, np.flatnonzero(usable)), Counter({task.lacks: num_unusable})


def _place_of(number: int, sources: _Sources, form: Format) -> str:
    """Where the comparison of that number stands, such as "pairs.jsonl:3". The sources are read once more for
    it: no row carries its place through the work that hardly ever fails."""
    places = (
        place
        for _, source, rows, _ in _parts(sources)
        for place, found in read_rows(source, rows, form)
        if isinstance(found, Comparison)
    )
    return next(islice(places, number, None))


def _tokenized(
    rows: Dataset, index: ComparisonIndex, chosen: np.ndarray, task: _Task, data: DataArguments
) -> Tokenized:
    num_proc = data.preprocessing_num_workers or default_num_proc()
    if task.step != 2:
        return task.tokenize(rows, num_proc=num_proc)
    _, group = np.unique(index.keys[chosen], return_inverse=True)
    return task.tokenize(rows, groups=group, num_proc=num_proc)


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


def _parts(sources: _Sources) -> Iterator[tuple[int, Source, Rows, bool]]:
    """The number and the source of all rows that are read, in their order, and whether they evaluate."""
    for number, source in enumerate(sources.all):
        if sources.are_for_evaluation(number):
            yield number, source, source.evaluation or source.training, True
        else:
            yield number, source, source.training, False
            if source.evaluation is not None and not sources.evaluation:
                yield number, source, source.evaluation, True


def _all_comparisons(
    sources: _Sources, form: Format, dropped: list[Counter]
) -> Iterator[tuple[Comparison, int, bool]]:
    """Every comparison of every source, with the source's number and whether it is for evaluation."""
    for number, source, rows, in_evaluation in _parts(sources):
        for comparison in read_comparisons(source, rows, form, dropped[number]):
            yield comparison, number, in_evaluation


def _assign(index: ComparisonIndex, sources: _Sources, data: DataArguments, seed: int) -> np.ndarray:
    """The part of each comparison, as `splits.assign` numbers them.

    The other steps do not know step 1's own sources, so they must not change the split of the shared ones:
    they give up prompts that those have, in any step.
    """
    shared = index.sources < len(sources.shared) + len(sources.evaluation)
    own = ~shared & ~np.isin(index.keys, index.keys[shared])
    weights = {n: source.weight for n, source in enumerate(sources.all) if source.weight is not None}
    parts = np.full(len(shared), splits.REPEATED, dtype=np.int8)
    for rows, shares, some in ((shared, data.shares, sources.shared), (own, (1.0, 0.0, 0.0), sources.own)):
        parts[rows] = splits.assign(
            index.keys[rows],
            index.sources[rows],
            index.in_evaluation[rows],
            eval_fraction=0.0 if sources.evaluation else data.eval_fraction,
            shares=shares,
            seed=seed,
            weights=weights if any(source.weight is not None for source in some) else None,
        )
    return parts


def _check_sources(sources: _Sources, index: ComparisonIndex, dropped: list[Counter]) -> None:
    """Raise `UserError` for a source without rows to train on, or to evaluate on."""
    for number, source in enumerate(sources.all):
        use = "evaluate" if sources.are_for_evaluation(number) else "train"
        if not np.any((index.sources == number) & (index.in_evaluation == (use == "evaluate"))):
            problem = f"{source.flag} {source.name} holds no rows to {use} on"
            why = listed(": dropped", dropped[number])
            raise UserError(f"{problem}{why}; leave it out or give another file.")


def _check_share(parts: np.ndarray, task: _Task, data: DataArguments) -> None:
    """Raise `UserError` where the split leaves the step nothing to train on."""
    sizes = np.bincount(parts[(parts >= 0) & (parts < splits.NUM_STEPS)], minlength=splits.NUM_STEPS)
    if sizes.sum() == 0:  # every source has rows to train on, or `_check_sources` would have spoken
        raise UserError(
            f"step {task.step} has no prompts to train on: all those of --data_path are also in the data for "
            "evaluation, and prompts for evaluation leave the training data. Give other data with "
            "--eval_data_path, or leave it out."
        )
    if sizes[task.step - 1] == 0:
        cut = ", ".join(map(str, sizes))
        raise UserError(
            f"step {task.step} has no prompts to train on: --data_split {data.data_split} cuts the "
            f"{sizes.sum()} training prompts into {cut}. Give step {task.step} a larger share, or give more "
            "data with --data_path."
        )


def _check_rows_left(tokenized: Tokenized, left_out: Counter[str], task: _Task) -> None:
    """Raise `UserError` where no training row is left."""
    if len(tokenized.rows) > 0:
        return
    problem = f"step {task.step} has no rows left to train on" + listed(": dropped", +left_out)
    if left_out[task.lacks] and not tokenized.dropped:
        raise UserError(f"{problem}. Give data that has what step {task.step} learns from (docs/data.md).")
    raise UserError(
        f"{problem}. {task.limit} is {task.max_tokens} and the shortest prompt has "
        f"{tokenized.shortest_prompt} tokens: raise it, or give other data."
    )


def _source_report(
    number: int, index: ComparisonIndex, parts: np.ndarray, dropped: Counter[str], task: _Task
) -> dict[str, Any]:
    mine = index.sources == number
    reasons, num_further = dict(dropped), 0
    for part, reason in REASONS.items():
        rows = np.flatnonzero(mine & (parts == part))
        if part == splits.REPEATED and task.step == 2:  # further pairs of a prompt are used
            first = splits.first_of_each(index.row_keys, np.arange(len(parts)))
            num_repeated, rows, reason = len(rows), np.setdiff1d(rows, first), "repeated row"
            num_further = num_repeated - len(rows)
        if len(rows):
            reasons[reason] = len(rows)
    parts = parts[mine]
    return {
        "rows": len(parts) + sum(dropped.values()),
        "further": num_further,
        "dropped": reasons,
        "shares": [int(np.sum(parts == step)) for step in range(splits.NUM_STEPS)],
        "evaluation": int(np.sum(parts == splits.EVALUATION)),
    }


def _columns_of(rows: Dataset) -> set[str]:
    """The names of the columns that any of the kept data rows has."""
    tables = rows.select_columns(["row"]).with_format("arrow").iter(1000)
    return {name for table in tables for row in table["row"].to_pylist() for name in json.loads(row)}


def _rows_report(tokenized: Tokenized, left_out: Counter[str]) -> dict[str, Any]:
    lengths = column(tokenized.rows, "length")
    return {
        "rows": len(lengths),
        "mean_length": float(lengths.mean()) if len(lengths) else 0.0,
        "fewer_turns": tokenized.num_fewer_turns,
        "cut": tokenized.num_cut,
        "dropped": dict(left_out),
    }


def _describe(report: dict[str, Any], task: _Task, sources: list[Source], folder: Path) -> str:
    """What became of the data, a line a source and two for the step."""
    lines = [f"data of step {task.step} (tokens kept in {folder})"]
    for source, counts in zip(sources, report["sources"], strict=True):
        shares = " + ".join(map(str, counts["shares"]))
        lines.append(
            f"  {source.name}: {counts['rows']} rows; {shares} prompts for steps 1 + 2 + 3"
            f" and {counts['evaluation']} for evaluation"
            + (f"; {counts['further']} rows are more answers to them" if counts["further"] else "")
            + listed("; dropped", counts["dropped"])
            + (f"; splits not used: {', '.join(source.unused)}" if source.unused else "")
        )
    for name in ("train", "evaluation"):
        counts = report[name]
        lines.append(
            f"  {name}: {counts['rows']} rows of {counts['mean_length']:.0f} tokens on average"
            + (f", {counts['fewer_turns']} without their first turns" if counts["fewer_turns"] else "")
            + (f", {counts['cut']} cut in their text to {task.limit}" if counts["cut"] else "")
            + listed("; dropped", counts["dropped"])
        )
    return "\n".join(lines)


def listed(intro: str, counts: Mapping[str, int]) -> str:
    """The intro and each count with its reason, or nothing where nothing was counted."""
    return (
        f"{intro} " + ", ".join(f"{number} ({reason})" for reason, number in counts.items()) if counts else ""
    )
