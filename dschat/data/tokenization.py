"""Text to token ids: one form for all steps, prompt + answer + the tokenizer's own end token.

The tokenizer's chat template makes the text (`dschat.data.templates`). Prompt and answer are tokenised apart,
so that a prompt has the same tokens in every step. What is too long loses whole early turns first, then text
of the prompt from its beginning, and an answer's text last; the end token stays.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, takewhile
from typing import Any
from uuid import uuid4

import numpy as np
import tokenizers
import xxhash
from datasets import Dataset, Features, Value
from datasets import Sequence as Tokens
from transformers import PreTrainedTokenizerBase

from dschat.data.comparisons import Prompt, answer_pairs, unpack_answers, unpack_prompt
from dschat.data.special_text import SpecialText
from dschat.data.templates import ChatTemplate
from dschat.errors import UserError

ROWS_A_PROCESS = 2000
"""Fewer rows are not worth another process."""

KEPT, FEWER_TURNS, CUT, LONG_PROMPT, EQUAL_ANSWERS, NO_TOKEN = range(6)
"""What became of a row: whole; without its first turns; cut in its text; and why it was dropped."""

REASONS = {
    LONG_PROMPT: "prompt over {limit}",
    EQUAL_ANSWERS: "answers equal as tokens",
    NO_TOKEN: "prompt without a token",
}

SFT_COLUMNS = {
    "input_ids": Tokens(Value("int32")),
    "loss_mask": Tokens(Value("bool")),
    "num_targets": Value("int32"),
}
PAIR_COLUMNS = {
    "chosen_ids": Tokens(Value("int32")),
    "rejected_ids": Tokens(Value("int32")),
    "prompt_length": Value("int32"),
    "group": Value("int32"),
    "margin": Value("float32"),
}
PROMPT_COLUMNS = {"input_ids": Tokens(Value("int32")), "key": Value("int64")}
READER_COLUMN = {"reader_ids": Tokens(Value("int32"))}
ROW_COLUMN = {"row": Value("string")}

Columns = dict[str, list]


class RowError(UserError):
    """A row cannot be tokenised: its number among the rows, and why. It can be pickled."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"row {number + 1} cannot be tokenised: {reason}")
        self.number, self.reason = number, reason

    def __reduce__(self) -> tuple[type, tuple[int, str]]:
        return RowError, (self.number, self.reason)


@dataclass(frozen=True)
class Tokenized:
    """Rows of token ids, and what it took to get them."""

    rows: Dataset
    num_fewer_turns: int
    """Rows kept whole but for their first turns."""
    num_cut: int
    """Rows kept, but cut inside their text, also those that had lost their first turns before."""
    dropped: dict[str, int]
    """Rows left out, by reason."""
    shortest_prompt: int
    """Tokens of the shortest prompt, before any was shortened or dropped; 0 without rows."""


def tokenize_sft(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_len: int,
    train_on_prompt: bool = False,
    num_proc: int = 1,
) -> Tokenized:
    """Columns input_ids (prompt and best answer), loss_mask, num_targets (how many it marks), length.

    To be learned are the answer and, in conversations that say so, the assistant's earlier turns; with
    `train_on_prompt` all but the first token. A row whose prompt alone is over `max_seq_len` is dropped.
    """
    encode = partial(
        _sft_batch, encoder=Encoder(tokenizer), max_seq_len=max_seq_len, train_on_prompt=train_on_prompt
    )
    return _tokenize(rows, encode, SFT_COLUMNS, "--max_seq_len", num_proc)


def tokenize_pairs(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_len: int,
    groups: np.ndarray | None = None,
    num_proc: int = 1,
) -> Tokenized:
    """Columns chosen_ids, rejected_ids (the same prompt and an answer each), prompt_length (the tokens before
    both answers), margin, length, of the longer one, group and weight: a row for every pair of answers.

    Shortened as in `tokenize_sft`; pairs whose answers are then equal are dropped. What is left of the pairs
    of one group weighs 1 together; `groups` [N] numbers each row's from 0, by default a row is a group.
    """
    groups = np.arange(len(rows)) if groups is None else groups
    encode = partial(_pair_batch, encoder=Encoder(tokenizer), max_seq_len=max_seq_len, groups=groups)
    return _tokenize(rows, encode, PAIR_COLUMNS, "--max_seq_len", num_proc, with_indices=True)


def tokenize_prompts(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_seq_len: int,
    reader: PreTrainedTokenizerBase | None = None,
    keep_rows: bool = False,
    num_proc: int = 1,
) -> Tokenized:
    """Columns input_ids (the prompt), key (a hash of them, int64) and length. Prompts that are too long lose
    whole early turns; those that still are are dropped.

    With `reader`, the tokenizer of a reward model that has its own, also reader_ids: the prompt in its tokens
    and template. With `keep_rows` also row: the whole data row as JSON.
    """
    encode = partial(
        _prompt_batch,
        encoder=Encoder(tokenizer),
        max_prompt_seq_len=max_prompt_seq_len,
        reader=Encoder(reader) if reader else None,
        keep_rows=keep_rows,
    )
    columns = PROMPT_COLUMNS | (READER_COLUMN if reader else {}) | (ROW_COLUMN if keep_rows else {})
    return _tokenize(rows, encode, columns, "--max_prompt_seq_len", num_proc)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, *, versioned: bool = True) -> str:
    """32 hex digits that change with anything that decides a fast tokenizer's tokens, its template aside.

    The library's version is among that; without `versioned` it is not, for files that outlive an upgrade.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # What the last call happened to ask for, not part of the tokenizer.
    state["truncation"] = state["padding"] = None
    known = [
        state,
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
        start_tokens(tokenizer),
        *([tokenizers.__version__] if versioned else []),
    ]
    return xxhash.xxh3_128_hexdigest(json.dumps(known, sort_keys=True).encode())


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text, such as its BOS token; often nothing."""
    probe = tokenizer("a", return_special_tokens_mask=True)
    added = probe["special_tokens_mask"]
    return probe["input_ids"][: added.index(0)]


def default_num_proc() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tokenize(
    rows: Dataset,
    encode: Callable[..., Columns],
    columns: dict[str, Any],
    flag: str,
    num_proc: int,
    *,
    with_indices: bool = False,
) -> Tokenized:
    """Run `encode` over batches of rows in parallel, then leave out and count what it marked as dropped.

    Raises `RowError` for a row that cannot be encoded, and `UserError` where a process was killed.
    """
    features = Features(**columns, length=Value("int32"), prompt_size=Value("int32"), fate=Value("int8"))
    if len(rows) == 0:  # of which `map` would make rows without columns
        return Tokenized(_empty(columns), 0, 0, dropped={}, shortest_prompt=0)
    num_proc = max(min(num_proc, len(rows) // ROWS_A_PROCESS), 1)
    with _threads_allowed(num_proc == 1), _killed_workers_named(num_proc):
        marked = rows.map(
            partial(_naming_the_row, encode=encode, with_indices=with_indices),
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            features=features,
            num_proc=num_proc if num_proc > 1 else None,
            new_fingerprint=uuid4().hex,  # the default would hash the tokenizer, slowly
            load_from_cache_file=False,
            desc="tokenising",
        )
    fates = column(marked, "fate")
    if "group" in columns:
        marked = _weighed(marked, fates <= CUT)
    counts = Counter(fates.tolist())
    return Tokenized(
        rows=marked.select(np.flatnonzero(fates <= CUT)).remove_columns(["fate", "prompt_size"]),
        num_fewer_turns=counts[FEWER_TURNS],
        num_cut=counts[CUT],
        dropped={name.format(limit=flag): counts[fate] for fate, name in REASONS.items() if counts[fate]},
        shortest_prompt=int(column(marked, "prompt_size").min(initial=1 << 30)),
    )


def _naming_the_row(
    batch: Columns, indices: list[int], encode: Callable[..., Columns], *, with_indices: bool
) -> Columns:
    """What `encode` makes of the rows. Raises `RowError` for the first that fails by itself."""

    def encoded(rows: Columns, numbers: list[int]) -> Columns:
        return encode(rows, numbers) if with_indices else encode(rows)

    try:
        return encoded(batch, indices)
    except Exception:
        for place, number in enumerate(indices):
            try:
                encoded({name: values[place : place + 1] for name, values in batch.items()}, [number])
            except Exception as error:
                reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                raise RowError(number, reason) from error
        raise  # no row by itself


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


def _weighed(pairs: Dataset, kept: np.ndarray) -> Dataset:
    """The pairs with their weights: those that are kept of one group weigh 1 together."""
    group = column(pairs, "group")
    sizes = np.bincount(group[kept], minlength=group.max(initial=0) + 1)
    weights = np.where(kept, 1 / np.maximum(sizes[group], 1), 0).astype(np.float32)
    return pairs.add_column("weight", weights)


def _empty(columns: dict[str, Any]) -> Dataset:
    weight = {"weight": Value("float32")} if "group" in columns else {}
    features = Features(**columns, length=Value("int32"), **weight)
    return Dataset.from_dict({name: [] for name in features}, features=features)


def column(rows: Dataset, name: str) -> np.ndarray:
    """A column of numbers as an array [N]."""
    return rows.select_columns([name]).with_format("arrow")[:][name].to_numpy()


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


@dataclass(frozen=True)
class _Row:
    """One prompt and answers to it, as token ids."""

    prompt: list[int]
    learned: list[bool]
    """Of the prompt's tokens, those that step 1 learns."""
    answers: list[list[int]]
    fate: int = KEPT

    @property
    def size(self) -> int:
        """Tokens of the prompt and its longest answer."""
        return len(self.prompt) + max(map(len, self.answers), default=0)


Reread = Callable[[list[int], list[Prompt]], list[_Row]]


class Encoder:
    """Prompts and answers to token ids, with a tokenizer and its template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        self._special = SpecialText(tokenizer)
        self._start = start_tokens(tokenizer)
        self._end = tokenizer.eos_token_id

    def prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Prompts with the tokenizer's start tokens, once, and no end token."""
        return [self._started(ids) for ids in self._encode([self._template.prompt(p) for p in prompts])]

    def answers_alone(self, answers: Sequence[str], ended: Sequence[bool]) -> list[list[int]]:
        """Answers to whatever prompts, with the end token where they `ended`; at least one token each.

        The text of a special token inside an answer is encoded as text: it is not the template's.
        """
        shown = [self._template.answer_alone(*pair) for pair in zip(answers, ended, strict=True)]
        encoded = self._encode(shown)
        for number, (whole, answer) in enumerate(zip(shown, answers, strict=True)):
            if self._special.is_in(answer):
                before, text, after = whole.partition(answer.strip())
                parts = self._encode([before, *self._special.cut(text), after])
                encoded[number] = list(chain.from_iterable(parts))
        return [
            self._ended(ids) if whole or not ids else ids for ids, whole in zip(encoded, ended, strict=True)
        ]

    def rows(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> list[_Row]:
        """Each prompt with its answers; none of the prompt is learned."""
        texts = [self._template.texts(*row) for row in zip(prompts, answers, strict=True)]
        rest = iter(self._encode([answer for _, shown in texts for answer in shown]))
        started = [self._started(ids) for ids in self._encode([asked for asked, _ in texts])]
        return [
            _Row(ids, [False] * len(ids), [self._ended(next(rest)) for _ in shown])
            for ids, (_, shown) in zip(started, texts, strict=True)
        ]

    def conversations(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[_Row]:
        """Each conversation with all that the assistant says marked as learned."""
        pieces = [self._template.pieces(*pair) for pair in zip(prompts, answers, strict=True)]
        rest = iter(self._encode([text for row in pieces for text, _ in row]))
        return [self._joined([(next(rest), learned) for _, learned in row]) for row in pieces]

    def _joined(self, pieces: list[tuple[list[int], bool]]) -> _Row:
        *before, (answer, _) = pieces
        ids = list(chain.from_iterable(ids for ids, _ in before))
        learned = list(chain.from_iterable([flag] * len(ids) for ids, flag in before))
        started = self._started(ids)
        learned = [False] * (len(started) - len(ids)) + learned
        return _Row(started, learned, [self._ended(answer)])

    def fitted(
        self, rows: Sequence[_Row], prompts: Sequence[Prompt], max_tokens: int, reread: Reread
    ) -> list[_Row]:
        """The rows within `max_tokens`, without their first turns or cut; or marked as to be dropped.

        `reread` makes the rows of those numbers of shorter prompts.
        """
        rows, prompts = list(rows), list(prompts)
        too_long = [number for number, row in enumerate(rows) if row.size > max_tokens]
        while too_long:
            shorter = [self._template.without_first_exchange(prompts[number]) for number in too_long]
            left = [(number, prompt) for number, prompt in zip(too_long, shorter, strict=True) if prompt]
            too_long = [number for number, _ in left]
            again = reread(too_long, [prompt for _, prompt in left])
            for (number, prompt), row in zip(left, again, strict=True):
                prompts[number], rows[number] = prompt, replace(row, fate=FEWER_TURNS)
            too_long = [number for number in too_long if rows[number].size > max_tokens]
        return [self._cut_to(max_tokens, *pair) for pair in zip(rows, prompts, strict=True)]

    def _cut_to(self, max_tokens: int, row: _Row, prompt: Prompt) -> _Row:
        if len(row.prompt) > max_tokens:
            return replace(row, fate=LONG_PROMPT)
        if row.size <= max_tokens:
            return row
        marks = self._started(self._encode([self._template.before_question(prompt)])[0])
        # A space at the end of the marks may be one token with the question's first word.
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(marks, row.prompt, strict=False))
        return _cut(row, max_tokens, len(self._start), len(list(shared)))

    def _started(self, ids: list[int]) -> list[int]:
        start = self._start
        return ids if start and ids[: len(start)] == start else start + ids

    def _ended(self, ids: list[int]) -> list[int]:
        while ids and ids[-1] == self._end:
            ids = ids[:-1]
        return [*ids, self._end]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return encoded["input_ids"]


def _cut(row: _Row, max_tokens: int, num_start: int, num_marks: int) -> _Row:
    """The row within `max_tokens`: the prompt gives way and keeps at least its last token; only then are
    answers cut, and still end with their end token.

    The prompt's first `num_start` tokens stay, and the first `num_marks`, which stand before its question,
    where there is room for more than them.
    """
    room = max_tokens - max(map(len, row.answers))
    num_head = num_marks if num_start < num_marks < min(room, len(row.prompt)) else num_start
    first = max(len(row.prompt) - max(room - num_head, 1), num_head)
    prompt = row.prompt[:num_head] + row.prompt[first:]
    learned = row.learned[:num_head] + row.learned[first:]
    room = max_tokens - len(prompt)
    answers = [ids if len(ids) <= room else ids[: room - 1] + ids[-1:] for ids in row.answers]
    return replace(row, prompt=prompt, learned=learned, answers=answers, fate=CUT)


def _sft_batch(batch: Columns, encoder: Encoder, max_seq_len: int, train_on_prompt: bool) -> Columns:
    prompts = [unpack_prompt(packed) for packed in batch["prompt"]]
    answers = [unpack_answers(*some)[0] for some in zip(batch["answers"], batch["answer_turns"], strict=True)]

    def read(numbers: list[int], prompts: list[Prompt], all_turns: bool) -> list[_Row]:
        texts = [answers[number] for number in numbers]
        if all_turns:
            return encoder.conversations(prompts, texts)
        return encoder.rows(prompts, [[text] for text in texts])

    table: list[tuple | None] = [None] * len(prompts)
    for all_turns in (False, True):
        chosen = [i for i, flag in enumerate(batch["learn_all_turns"]) if flag == all_turns]
        asked = [prompts[i] for i in chosen]
        rows = read(chosen, asked, all_turns)
        fitted = encoder.fitted(
            rows,
            asked,
            max_seq_len,
            lambda numbers, shorter, c=chosen, a=all_turns: read([c[n] for n in numbers], shorter, a),
        )
        for i, row, fit in zip(chosen, rows, fitted, strict=True):
            table[i] = (*_sft_row(fit, train_on_prompt), len(row.prompt), fit.fate)
    return _columns(table, SFT_COLUMNS)


def _sft_row(row: _Row, train_on_prompt: bool) -> tuple[list[int], list[bool], int, int]:
    ids = row.prompt + row.answers[0]
    mask = [True] * len(ids) if train_on_prompt else row.learned + [True] * len(row.answers[0])
    mask[0] = False  # nothing precedes the first token, so nothing can predict it
    return ids, mask, sum(mask), len(ids)


def _pair_batch(
    batch: Columns, indices: list[int], encoder: Encoder, max_seq_len: int, groups: np.ndarray
) -> Columns:
    prompts = [unpack_prompt(packed) for packed in batch["prompt"]]
    texts = [unpack_answers(*some) for some in zip(batch["answers"], batch["answer_turns"], strict=True)]
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
            fate = EQUAL_ANSWERS if chosen == rejected and fitted.fate != LONG_PROMPT else fitted.fate
            length = len(fitted.prompt) + max(len(chosen), len(rejected))
            pair = (fitted.prompt + chosen, fitted.prompt + rejected)
            values = (int(groups[indices[i]]), batch["margin"][i], length, len(row.prompt), fate)
            table.append((*pair, len(fitted.prompt), *values))
    return _columns(table, PAIR_COLUMNS)


def _prompt_batch(
    batch: Columns, encoder: Encoder, max_prompt_seq_len: int, reader: Encoder | None, keep_rows: bool
) -> Columns:
    prompts = [unpack_prompt(packed) for packed in batch["prompt"]]
    rows = encoder.rows(prompts, [()] * len(prompts))
    fitted_rows = encoder.fitted(
        rows, prompts, max_prompt_seq_len, lambda numbers, shorter: encoder.rows(shorter, [()] * len(numbers))
    )
    extra = ({"reader_ids": reader.prompts(prompts)} if reader else {}) | (
        {"row": batch["row"]} if keep_rows else {}
    )
    table = []
    for number, (row, fitted) in enumerate(zip(rows, fitted_rows, strict=True)):
        ids = fitted.prompt
        fate = fitted.fate if ids else NO_TOKEN
        more = (values[number] for values in extra.values())
        table.append((ids, content_key(ids), *more, len(ids), len(row.prompt), fate))
    return _columns(table, {**PROMPT_COLUMNS, **extra})


def content_key(ids: Sequence[int]) -> int:
    """A hash of token ids that fits int64: the name of a prompt for keyed sampling."""
    digest = xxhash.xxh3_64_digest(np.asarray(ids, dtype="<i4").tobytes())
    return int.from_bytes(digest, "big", signed=True)


def _columns(table: list[tuple], names: dict[str, Any]) -> Columns:
    """Rows as columns: `names`, then length, prompt_size and fate."""
    names = [*names, "length", "prompt_size", "fate"]
    columns = list(map(list, zip(*table, strict=True))) if table else [[] for _ in names]
    return dict(zip(names, columns, strict=True))
