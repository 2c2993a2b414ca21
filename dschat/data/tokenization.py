"""Text to token ids: one form for all steps, prompt + answer + the tokenizer's own end token.

The tokenizer's chat template makes the text (`dschat.data.templates`). Prompt and answer are tokenised apart,
so that a prompt has the same tokens in every step. What is too long loses whole early turns first, then text
of the prompt from its beginning, and an answer's text last; the end token stays.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import xxhash
from transformers import PreTrainedTokenizerBase

from dschat.data.comparisons import Prompt, Reply, Turn, answer_pairs, unpack_answers, unpack_prompt
from dschat.data.encoder import EncodedRow, Encoder
from dschat.data.refused_rows import Columns, encode_rows, refused_rows
from dschat.data.rows import Rows
from dschat.data.token_turns import tokens_of
from dschat.data.truncation import REASONS, Truncation
from dschat.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

ROWS_A_PROCESS = 2000
"""Fewer rows are not worth another process."""

SFT_COLUMNS = {
    "input_ids": pa.list_(pa.int32()),
    "loss_mask": pa.list_(pa.bool_()),
    "num_targets": pa.int32(),
}
PAIR_COLUMNS = {
    "chosen_ids": pa.list_(pa.int32()),
    "rejected_ids": pa.list_(pa.int32()),
    "prompt_length": pa.int32(),
    "group": pa.int32(),
    "source": pa.int32(),
    "margin": pa.float32(),
}
PROMPT_COLUMNS = {"input_ids": pa.list_(pa.int32()), "key": pa.int64()}
REWARD_TOKENS_COLUMN = {"reader_ids": pa.list_(pa.int32())}
ROW_COLUMN = {"row": pa.string()}


@dataclass(frozen=True)
class Tokenized:
    """Rows of token ids, and what it took to get them."""

    rows: "Dataset"
    num_fewer_turns: int
    """Rows kept whole but for their first turns."""
    num_cut: int
    """Rows kept, but cut inside their text, also those that had lost their first turns before."""
    dropped: dict[str, int]
    """Rows left out, by reason."""
    unshown: dict[str, int]
    """What kept rows hold that the template does not show, and in how many."""
    shortest_prompt: int
    """Tokens of the shortest prompt, before any was shortened or dropped; 0 without rows."""
    refused: dict[int, str] = field(default_factory=dict)
    """The numbers of rows that are left out since they cannot be tokenised, and why."""


def tokenize_sft(
    rows: "Dataset",
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_len: int,
    train_on_prompt: bool = False,
    num_proc: int = 1,
    mark_refused: bool = False,
) -> Tokenized:
    """Columns input_ids (prompt and best answer), loss_mask, num_targets (how many it marks), length.

    To be learned are the answer and, in conversations that say so, the assistant's earlier turns; with
    `train_on_prompt` all but the first token; and in any case what a turn's own mark says. A row whose prompt
    alone is over `max_seq_len` is dropped, and one in which nothing is left to learn.
    """
    encoder = Encoder(tokenizer)
    encoder.check_answers()
    encode = partial(_sft_batch, encoder=encoder, max_seq_len=max_seq_len, train_on_prompt=train_on_prompt)
    return _tokenize(rows, encode, SFT_COLUMNS, "--max_seq_len", num_proc, mark_refused)


def tokenize_pairs(
    rows: "Dataset",
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_len: int,
    groups: np.ndarray | None = None,
    sources: np.ndarray | None = None,
    num_proc: int = 1,
    mark_refused: bool = False,
) -> Tokenized:
    """Columns chosen_ids, rejected_ids (the same prompt and an answer each), prompt_length (the tokens before
    both answers), margin, length, of the longer one, group, source and weight: a row for every pair of
    answers.

    Shortened as in `tokenize_sft`; pairs whose answers are then equal are dropped. What is left of the pairs
    of one group weighs 1 together; `groups` [N] numbers each row's from 0, by default a row is a group, and
    `sources` [N] its data set, by default 0.
    """
    groups = np.arange(len(rows)) if groups is None else groups
    sources = np.zeros(len(rows), int) if sources is None else sources
    encoder = Encoder(tokenizer)
    encoder.check_answers()
    encode = partial(_pair_batch, encoder=encoder, max_seq_len=max_seq_len, groups=groups, sources=sources)
    return _tokenize(rows, encode, PAIR_COLUMNS, "--max_seq_len", num_proc, mark_refused, with_indices=True)


def tokenize_prompts(
    rows: "Dataset",
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_seq_len: int,
    reward_tokenizer: PreTrainedTokenizerBase | None = None,
    keep_rows: bool = False,
    num_proc: int = 1,
    mark_refused: bool = False,
) -> Tokenized:
    """Columns input_ids (the prompt), key (a hash of them, int64) and length. Prompts that are too long lose
    whole early turns; those that still are are dropped.

    With `reward_tokenizer`, of a reward model that has its own, also reader_ids: the prompt in its tokens and
    template. With `keep_rows` also row: the whole data row as JSON.
    """
    encode = partial(
        _prompt_batch,
        encoder=Encoder(tokenizer),
        max_prompt_seq_len=max_prompt_seq_len,
        reward_encoder=Encoder(reward_tokenizer) if reward_tokenizer else None,
        keep_rows=keep_rows,
    )
    columns = (
        PROMPT_COLUMNS
        | (REWARD_TOKENS_COLUMN if reward_tokenizer else {})
        | (ROW_COLUMN if keep_rows else {})
    )
    return _tokenize(rows, encode, columns, "--max_prompt_seq_len", num_proc, mark_refused)


def default_num_proc() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tokenize(
    rows: "Dataset",
    encode: Callable[..., Columns],
    columns: dict[str, Any],
    flag: str,
    num_proc: int,
    mark_refused: bool,
    *,
    with_indices: bool = False,
) -> Tokenized:
    """Run `encode` over batches of rows in parallel, then leave out and count what it marked as dropped.

    Raises `RowError` for a row that cannot be encoded, unless those are to be left out too, and `UserError`
    where a process was killed.
    """
    from datasets import Features

    aside = {"prompt_size": pa.int32(), "unshown": pa.string(), "truncation": pa.int8()}
    kinds = columns | {"length": pa.int32()} | aside
    if len(rows) == 0:  # of which `map` would make rows without columns
        return Tokenized(_empty(columns), 0, 0, dropped={}, unshown={}, shortest_prompt=0)
    num_proc = max(min(num_proc, len(rows) // ROWS_A_PROCESS), 1)
    with _threads_allowed(num_proc == 1), _killed_workers_named(num_proc):
        marked = rows.map(
            partial(
                encode_rows,
                encode=encode,
                with_indices=with_indices,
                marked_as=kinds if mark_refused else None,
            ),
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            features=Features.from_arrow_schema(pa.schema(kinds)),
            num_proc=num_proc if num_proc > 1 else None,
            new_fingerprint=uuid4().hex,  # the default would hash the tokenizer, slowly
            load_from_cache_file=False,
            desc="tokenising",
        )
    truncations = column(marked, "truncation")
    if "group" in columns:
        marked = _weighed(marked, truncations <= Truncation.CUT)
    counts = Counter(truncations.tolist())
    return Tokenized(
        rows=marked.select(np.flatnonzero(truncations <= Truncation.CUT)).remove_columns(list(aside)),
        num_fewer_turns=counts[Truncation.FEWER_TURNS],
        num_cut=counts[Truncation.CUT],
        dropped={
            name.format(limit=flag): counts[truncation]
            for truncation, name in REASONS.items()
            if counts[truncation]
        },
        unshown=_unshown(marked, truncations),
        shortest_prompt=int(
            column(marked, "prompt_size")[truncations != Truncation.WITH_TOOLS].min(initial=1 << 30)
        ),
        refused=refused_rows(marked, truncations),
    )


def _unshown(marked: "Dataset", truncations: np.ndarray) -> dict[str, int]:
    """In how many of the rows that are kept there is what the template does not show, by its name."""
    table = marked.select_columns(["unshown"]).with_format("arrow")[:]
    kept = table["unshown"].to_numpy()[truncations <= Truncation.CUT]
    names, counts = np.unique(kept.astype(str), return_counts=True)
    found: Counter[str] = Counter()
    for listed, count in zip(names.tolist(), counts.tolist(), strict=True):
        found.update({name: count for name in listed.split("\n") if name})
    return dict(found)


@contextmanager
def _killed_workers_named(num_proc: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "abruptly died" not in str(error):
            raise
        raise UserError(
            f"one of {num_proc} processes that tokenise was killed, most often because memory ran out (dmesg "
            "tells); use fewer with --preprocessing_num_workers."
        ) from error


def _weighed(pairs: "Dataset", kept: np.ndarray) -> "Dataset":
    """The pairs with their weights: those that are kept of one group weigh 1 together."""
    group = column(pairs, "group")
    sizes = np.bincount(group[kept], minlength=group.max(initial=0) + 1)
    weights = np.where(kept, 1 / np.maximum(sizes[group], 1), 0).astype(np.float32)
    return pairs.add_column("weight", weights)


def _empty(columns: dict[str, Any]) -> "Dataset":
    from datasets import Dataset

    weight = {"weight": pa.float32()} if "group" in columns else {}
    return Dataset(pa.schema(columns | {"length": pa.int32()} | weight).empty_table())


def column(rows: "Dataset", name: str) -> np.ndarray:
    """A column of numbers as an array [N]."""
    return Rows.of(rows.select_columns([name])).column(name)


@contextmanager
def _threads_allowed(allowed: bool) -> Iterator[None]:
    """Whether a tokenizer may use threads of its own: not where several processes share the cores already."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = str(allowed).lower()
    try:
        yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _sft_batch(batch: Columns, encoder: Encoder, max_seq_len: int, train_on_prompt: bool) -> Columns:
    prompts = [unpack_prompt(packed) for packed in batch["prompt"]]
    answers = [some[0] for some in _answers_of(batch)]
    conversations = zip(prompts, answers, batch["learn_all_turns"], strict=True)
    in_pieces = [all_turns or _has_marks(prompt, answer) for prompt, answer, all_turns in conversations]

    def in_turns(numbers: list[int], prompts: list[Prompt]) -> list[EncodedRow]:
        texts = [answers[number] for number in numbers]
        all_turns = [batch["learn_all_turns"][number] for number in numbers]
        return encoder.conversations(prompts, texts, all_turns, with_prompt=train_on_prompt)

    def whole(numbers: list[int], prompts: list[Prompt]) -> list[EncodedRow]:
        return encoder.rows(prompts, [[answers[number]] for number in numbers], learned=train_on_prompt)

    table: dict[int, tuple] = {}
    for encode, flag in ((in_turns, True), (whole, False)):
        chosen = [number for number, some in enumerate(in_pieces) if some == flag]
        asked = [prompts[number] for number in chosen]
        rows = encode(chosen, asked)
        fitted = encoder.fitted(rows, asked, max_seq_len, partial(_encode_again, encode, chosen))
        for number, row, fit in zip(chosen, rows, fitted, strict=True):
            ids, mask = _sft_row(fit)
            truncation = (
                Truncation.NOTHING_LEARNED if fit.truncation.is_kept and not any(mask) else fit.truncation
            )
            unshown = encoder.unshown(prompts[number], [answers[number]], fit.num_missed)
            table[number] = (ids, mask, sum(mask), len(ids), len(row.prompt), unshown, truncation)
    return _columns([table[number] for number in range(len(prompts))], SFT_COLUMNS)


def _encode_again(
    encode: Callable[[list[int], list[Prompt]], list[EncodedRow]],
    chosen: list[int],
    places: list[int],
    shorter: list[Prompt],
) -> list[EncodedRow]:
    """Encode shorter prompts of the examples at those places of `chosen`."""
    return encode([chosen[place] for place in places], shorter)


def _answers_of(batch: Columns) -> list[list[Reply]]:
    return [unpack_answers(*some) for some in zip(batch["answers"], batch["answer_turns"], strict=True)]


def _has_marks(prompt: Prompt, answer: Reply) -> bool:
    """Whether any turn is marked as to be learned or not."""
    turns = (answer,) if isinstance(prompt, str) else (*prompt, answer)
    return any(isinstance(turn, Turn) and turn.learn is not None for turn in turns)


def _sft_row(row: EncodedRow) -> tuple[list[int], list[bool]]:
    ids = row.prompt + row.answers[0]
    mask = row.learned + [row.answer_learned] * len(row.answers[0])
    return ids, [False, *mask[1:]]  # nothing precedes the first token, so nothing can predict it


def _pair_batch(
    batch: Columns,
    indices: list[int],
    encoder: Encoder,
    max_seq_len: int,
    groups: np.ndarray,
    sources: np.ndarray,
) -> Columns:
    prompts = [unpack_prompt(packed) for packed in batch["prompt"]]
    texts = _answers_of(batch)
    rows = encoder.rows(prompts, texts)
    fitted_rows = encoder.fitted(
        rows,
        prompts,
        max_seq_len,
        lambda numbers, shorter: encoder.rows(shorter, [texts[n] for n in numbers]),
    )
    table = []
    for i, (row, fitted) in enumerate(zip(rows, fitted_rows, strict=True)):
        answers, ranks = texts[i], batch["ranks"][i]
        for better, worse in answer_pairs(list(range(len(answers))), ranks):
            chosen, rejected = fitted.answers[better], fitted.answers[worse]
            truncation = fitted.truncation
            if chosen == rejected and truncation.is_kept:
                truncation = Truncation.EQUAL_ANSWERS
            length = len(fitted.prompt) + max(len(chosen), len(rejected))
            pair = (fitted.prompt + chosen, fitted.prompt + rejected)
            unshown = encoder.unshown(prompts[i], [answers[better], answers[worse]])
            numbers = (int(groups[indices[i]]), int(sources[indices[i]]), batch["margin"][i], length)
            table.append((*pair, len(fitted.prompt), *numbers, len(row.prompt), unshown, truncation))
    return _columns(table, PAIR_COLUMNS)


def _prompt_batch(
    batch: Columns, encoder: Encoder, max_prompt_seq_len: int, reward_encoder: Encoder | None, keep_rows: bool
) -> Columns:
    prompts = [unpack_prompt(packed) for packed in batch["prompt"]]
    rows = encoder.rows(prompts, [()] * len(prompts))
    fitted_rows = encoder.fitted(
        rows, prompts, max_prompt_seq_len, lambda numbers, shorter: encoder.rows(shorter, [()] * len(numbers))
    )
    if reward_encoder and any(tokens_of(prompt) is not None for prompt in prompts):
        raise UserError(
            "the prompt is token ids, which a reward model with a tokenizer of its own cannot read."
        )
    reread = reward_encoder.rows(prompts, [()] * len(prompts)) if reward_encoder else []
    extra = ({"reader_ids": [row.prompt for row in reread]} if reward_encoder else {}) | (
        {"row": batch["row"]} if keep_rows else {}
    )
    table = []
    for number, (row, fitted) in enumerate(zip(rows, fitted_rows, strict=True)):
        ids = fitted.prompt
        truncation = Truncation.NO_TOKEN if fitted.truncation.is_kept and not ids else fitted.truncation
        if reread and reread[number].truncation == Truncation.WITH_TOOLS:
            truncation = Truncation.WITH_TOOLS
        more = (values[number] for values in extra.values())
        unshown = encoder.unshown(prompts[number], ())
        table.append((ids, content_key(ids), *more, len(ids), len(row.prompt), unshown, truncation))
    return _columns(table, {**PROMPT_COLUMNS, **extra})


def content_key(ids: Sequence[int]) -> int:
    """A hash of token ids that fits int64: the name of a prompt for keyed sampling."""
    digest = xxhash.xxh3_64_digest(np.asarray(ids, dtype="<i4").tobytes())
    return int.from_bytes(digest, "big", signed=True)


def _columns(table: list[tuple], names: dict[str, Any]) -> Columns:
    """Rows as columns: `names`, then length, prompt_size, unshown and truncation."""
    every = [*names, "length", "prompt_size", "unshown", "truncation"]
    columns = list(map(list, zip(*table, strict=True))) if table else [[] for _ in every]
    return dict(zip(every, columns, strict=True))
