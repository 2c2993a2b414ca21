"""From --data_path to one step's token ids: read, de-duplicate, split, tokenise, keep.

Called on every rank before the process group exists; the first to come does the work (`dschat.data.cache`).
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from dschat.arguments import DataArguments
from dschat.console import messages
from dschat.console.progress import Progress
from dschat.data import splits
from dschat.data.cache import cache_folder, cached
from dschat.data.cells import BadRow
from dschat.data.comparisons import ComparisonIndex, write_comparisons
from dschat.data.contradictions import count_contradictions
from dschat.data.findings import Findings
from dschat.data.reading import Format
from dschat.data.refused_rows import RowError
from dschat.data.report import columns_of, describe, listed, num_related, rows_report, source_report
from dschat.data.rows import Rows
from dschat.data.share import Task, rows_of_part, some_of
from dschat.data.source_set import SourceSet
from dschat.data.tokenization import (
    Tokenized,
    default_num_proc,
    tokenize_pairs,
    tokenize_prompts,
    tokenize_sft,
)
from dschat.data.tokenizer_fingerprint import tokenizer_fingerprint
from dschat.data.truncation import NOT_FOR_LENGTH
from dschat.errors import UserError
from dschat.fingerprint import fingerprint

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT = 8
"""Raise it when code changes what the same input becomes, lest old results be taken for new ones."""


@dataclass(frozen=True)
class SplitData:
    """Token ids of one step, on disk and memory-mapped. `evaluation` may be empty."""

    train: Rows
    evaluation: Rows
    num_rows: dict[str, int]
    """Rows of each source, those included that were dropped or went to other steps."""
    key: str
    """The fingerprint of all that shaped the rows and their order."""
    columns: tuple[str, ...] = ()
    """The columns of the data rows, where those are kept."""
    sources: tuple[str, ...] = ()
    """The names of the data sets, by the numbers in the column source of pairs."""

    @property
    def longest(self) -> int:
        """The length of the longest row of either part, in tokens."""
        return max(part.column("length").max(initial=0) for part in (self.train, self.evaluation))


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
    settings: dict[str, Any] = {"max_seq_len": max_seq_len, "train_on_prompt": train_on_prompt}
    tokenize = partial(tokenize_sft, tokenizer=tokenizer, **settings)
    task = Task(
        1,
        tokenize,
        "--max_seq_len",
        max_seq_len,
        settings,
        lacks="no answer to learn",
        unique_prompts=data.unique_prompts,
    )
    return _prepare(task, data, tokenizer, seed, sft_only_data_path)


def reward_data(
    data: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_len: int,
    seed: int,
    sft_only_data_path: Sequence[str] = (),
) -> SplitData:
    """The pairs of step 2 and of DPO, which has `sft_only_data_path` too, as `tokenize_pairs` makes them.

    The pairs of one prompt weigh 1 together. Raises `UserError` as `sft_data` does.
    """
    settings: dict[str, Any] = {"max_seq_len": max_seq_len}
    tokenize = partial(tokenize_pairs, tokenizer=tokenizer, **settings)
    task = Task(2, tokenize, "--max_seq_len", max_seq_len, settings, lacks="no two answers to compare")
    return _prepare(task, data, tokenizer, seed, sft_only_data_path)


def prompt_data(
    data: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_seq_len: int,
    seed: int,
    reward_tokenizer: PreTrainedTokenizerBase | None = None,
    keep_rows: bool = False,
) -> SplitData:
    """Step 3's prompts, as `tokenize_prompts` makes them; `reward_tokenizer` is a reward model's own.

    Raises `UserError` as `sft_data` does.
    """
    settings: dict[str, Any] = {"max_prompt_seq_len": max_prompt_seq_len}
    tokenize = partial(
        tokenize_prompts,
        tokenizer=tokenizer,
        reward_tokenizer=reward_tokenizer,
        keep_rows=keep_rows,
        **settings,
    )
    if reward_tokenizer is not None:
        settings["reader"] = _text_fingerprint(reward_tokenizer)
    if keep_rows:
        settings["keep_rows"] = True
    task = Task(
        3,
        tokenize,
        "--max_prompt_seq_len",
        max_prompt_seq_len,
        settings,
        keep_rows=keep_rows,
        unique_prompts=data.unique_prompts,
    )
    return _prepare(task, data, tokenizer, seed)


def _text_fingerprint(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """What decides the tokens of a conversation."""
    return [tokenizer_fingerprint(tokenizer), tokenizer.chat_template]


def _prepare(
    task: Task,
    data: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    own_data_path: Sequence[str] = (),
) -> SplitData:
    sources = SourceSet.open(data, own_data_path)
    form = replace(Format.of(data), keep_rows=task.keep_rows)
    key = fingerprint(
        {
            "format": FORMAT,
            "step": task.step,
            "settings": task.settings,
            **sources.identities,
            "form": [form.name, form.keys, form.drop_bad_rows],
            "tokenizer": _text_fingerprint(tokenizer),
            "shares": data.shares,
            "eval_fraction": data.eval_fraction,
            "max_train_samples": data.max_train_samples,
            "unique_prompts": data.unique_prompts,
            "seed": seed,
        }
    )
    folder = cached(
        cache_folder(data.data_output_path), key, lambda place: _build(place, task, data, seed, sources, form)
    )
    try:
        report = json.loads((folder / "report.json").read_text())
        train, evaluation = (Rows.read(folder / name) for name in ("train", "evaluation"))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(
            f"the tokens kept in {folder} cannot be read ({error}); remove that folder."
        ) from error
    messages.info(describe(report, task, sources.all, folder))
    counts = zip(sources.all, report["sources"], strict=True)
    num_rows = {source.name: count["rows"] for source, count in counts}
    names = tuple(source.name for source in sources.all)
    return SplitData(train, evaluation, num_rows, key, tuple(report.get("columns", ())), names)


def _build(
    folder: Path, task: Task, data: DataArguments, seed: int, sources: SourceSet, form: Format
) -> None:
    """Fill the folder with train/, evaluation/ (saved by `datasets`) and report.json."""
    from datasets import Dataset, are_progress_bars_disabled

    text = folder / "comparisons.arrow"
    findings = [Findings() for _ in sources.all]
    comparisons = sources.comparisons(form, findings)
    bar = Progress(comparisons, desc="reading", unit=" rows", delay=2, disable=are_progress_bars_disabled())
    index = write_comparisons(bar, text)
    first = assign_parts(index, sources, data, seed, step=task.step)
    sources.check(index, findings)
    _check_share(first, task, data)
    parts = splits.parts_of_prompts(index.keys, index.in_evaluation, first)
    rows = Dataset.from_file(str(text))
    report: dict[str, Any] = {
        "sources": [
            source_report(number, index, first, parts, found, task) for number, found in enumerate(findings)
        ],
        "related": num_related(index.families, first),
    }
    for name, part in (("train", task.step - 1), ("evaluation", splits.EVALUATION)):
        chosen, left_out = rows_of_part(part, index, parts, task)
        if name == "train" and data.max_train_samples is not None:
            left_out["over --max_train_samples"] = max(len(chosen) - data.max_train_samples, 0)
            chosen = some_of(chosen, index, data.max_train_samples, seed)
        try:
            tokenized = _tokenized(rows.select(chosen), index, chosen, task, data)
        except RowError as error:
            place = sources.place_of(int(chosen[error.number]), form)
            raise UserError(
                f"{place}: {error.reason} Correct the row or remove it, or leave out all such rows with "
                "--on_bad_row drop."
            ) from error
        left_out.update(tokenized.dropped)
        left_out.update(f"bad row: {BadRow(reason).reason}" for reason in tokenized.refused.values())
        if name == "train":
            _check_rows_left(tokenized, left_out, task, findings)
        with _without_progress_bar():
            # By itself `datasets` gives no rows no file, and cannot load that.
            tokenized.rows.save_to_disk(str(folder / name), num_shards=None if len(tokenized.rows) else 1)
        report[name] = rows_report(tokenized, +left_out)
        for number, reason in islice(tokenized.refused.items(), 1):
            report[name]["refused"] = f"{sources.place_of(int(chosen[number]), form)}: {reason}"
        if task.step == 2:
            report[name]["contradictions"] = count_contradictions(rows.select(chosen), index.keys[chosen])
        if task.keep_rows:
            report["columns"] = sorted({*report.get("columns", ()), *columns_of(tokenized.rows)})
    text.unlink()
    for scratch in folder.glob("cache-*.arrow"):
        scratch.unlink()
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")


def _tokenized(
    rows: "Dataset", index: ComparisonIndex, chosen: np.ndarray, task: Task, data: DataArguments
) -> Tokenized:
    how: dict[str, Any] = {
        "num_proc": data.preprocessing_num_workers or default_num_proc(),
        "mark_refused": data.on_bad_row == "drop",
    }
    if task.step == 2:
        groups = np.unique(index.keys[chosen], return_inverse=True)[1]
        how |= {"groups": groups, "sources": index.sources[chosen]}
    if sys.stderr.isatty():
        return task.tokenize(rows, **how)
    messages.info(f"tokenising {len(rows):,} rows", every_rank=True)  # of whichever rank does it
    with _without_progress_bar():
        return task.tokenize(rows, **how)


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """For work that is quick beside tokenisation, which has a bar on a terminal."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def assign_parts(
    index: ComparisonIndex, sources: SourceSet, data: DataArguments, seed: int, *, step: int = 1
) -> np.ndarray:
    """The part of each comparison, as `splits.assign` numbers them.

    The other steps do not know the step's own sources, so they must not change the split of the shared ones:
    a prompt that those have stays in its part.
    """
    all_of_it = tuple(float(number == step) for number in range(1, splits.NUM_STEPS + 1))
    shared = index.sources < len(sources.shared) + len(sources.evaluation)
    own = ~shared & ~np.isin(index.keys, index.keys[shared])
    weights = {n: source.weight for n, source in enumerate(sources.all) if source.weight is not None}
    parts = np.full(len(shared), splits.REPEATED, dtype=np.int8)
    for rows, shares, some in ((shared, data.shares, sources.shared), (own, all_of_it, sources.own)):
        parts[rows] = splits.assign(
            index.keys[rows],
            index.sources[rows],
            index.in_evaluation[rows],
            eval_fraction=0.0 if sources.evaluation else data.eval_fraction,
            shares=shares,
            seed=seed,
            weights=weights if any(source.weight is not None for source in some) else None,
            families=index.families[rows],
        )
    return parts


def _check_share(parts: np.ndarray, task: Task, data: DataArguments) -> None:
    """Raise `UserError` where the split leaves the step nothing to train on."""
    sizes = np.bincount(parts[(parts >= 0) & (parts < splits.NUM_STEPS)], minlength=splits.NUM_STEPS)
    if sizes.sum() == 0:  # every source has rows to train on, or `SourceSet.check` would have spoken
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


def _check_rows_left(
    tokenized: Tokenized, left_out: Counter[str], task: Task, findings: list[Findings]
) -> None:
    """Raise `UserError` where no training row is left."""
    if len(tokenized.rows) > 0:
        return
    problem = f"step {task.step} has no rows left to train on" + listed(": dropped", +left_out)
    problem += listed("; rows have", sum((found.unlearned for found in findings), Counter()))
    if tokenized.refused:
        raise UserError(f"{problem}. The first that is refused: {next(iter(tokenized.refused.values()))}")
    if left_out[task.lacks] and not tokenized.dropped:
        raise UserError(f"{problem}. Give data that has what step {task.step} learns from (docs/data.md).")
    if set(tokenized.dropped) <= NOT_FOR_LENGTH:
        raise UserError(f"{problem}. Give other data, or another --chat_template (docs/data.md).")
    raise UserError(
        f"{problem}. {task.limit} is {task.max_tokens} and the shortest prompt has "
        f"{tokenized.shortest_prompt} tokens: raise it, or give other data."
    )
