"""Text to token ids: one format for all steps, prompt + answer + the tokenizer's own end token.

Prompt and answer are tokenised apart, so that a prompt has the same tokens in every step.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

import numpy as np
import tokenizers
import xxhash
from datasets import Dataset, Features, Value
from datasets import Sequence as Tokens
from transformers import PreTrainedTokenizerBase

ROWS_A_PROCESS = 2000
"""Fewer rows are not worth another process."""

KEPT, CUT, LONG_PROMPT, EQUAL_ANSWERS, NO_TOKEN = range(5)
"""What became of a row: whole; shortened; and the reasons it was dropped for."""

REASONS = {
    LONG_PROMPT: "prompt over {limit}",
    EQUAL_ANSWERS: "answers equal as tokens",
    NO_TOKEN: "prompt without a token",
}

SFT_COLUMNS = {
    "input_ids": Tokens(Value("int32")),
    "prompt_length": Value("int32"),
    "num_targets": Value("int32"),
}
PAIR_COLUMNS = {"chosen_ids": Tokens(Value("int32")), "rejected_ids": Tokens(Value("int32"))}
PROMPT_COLUMNS = {"input_ids": Tokens(Value("int32")), "key": Value("int64")}


@dataclass(frozen=True)
class Tokenized:
    """Rows of token ids, and what it took to get them."""

    rows: Dataset
    num_cut: int
    """Rows kept, but shortened."""
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
    """Columns input_ids (prompt and chosen answer), prompt_length, num_targets, length.

    The last num_targets tokens are to be learned: the answer, or with `train_on_prompt` all but the first.
    A row over `max_seq_len` loses the prompt's first tokens; one whose prompt alone is over it is dropped.
    """
    encode = partial(
        _sft_batch, tokenizer=tokenizer, max_seq_len=max_seq_len, train_on_prompt=train_on_prompt
    )
    return _tokenize(rows, encode, SFT_COLUMNS, "--max_seq_len", num_proc)


def tokenize_pairs(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_seq_len: int, num_proc: int = 1
) -> Tokenized:
    """Columns chosen_ids, rejected_ids (each the same prompt and its answer) and length, of the longer one.

    Shortened as in `tokenize_sft`; pairs whose answers are then equal are dropped.
    """
    encode = partial(_pair_batch, tokenizer=tokenizer, max_seq_len=max_seq_len)
    return _tokenize(rows, encode, PAIR_COLUMNS, "--max_seq_len", num_proc)


def tokenize_prompts(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_prompt_seq_len: int, num_proc: int = 1
) -> Tokenized:
    """Columns input_ids (the prompt), key (a hash of them, int64) and length. Longer prompts are dropped."""
    encode = partial(_prompt_batch, tokenizer=tokenizer, max_prompt_seq_len=max_prompt_seq_len)
    return _tokenize(rows, encode, PROMPT_COLUMNS, "--max_prompt_seq_len", num_proc)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """32 hex digits that change with anything that decides a fast tokenizer's tokens."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # What the last call happened to ask for, not part of the tokenizer.
    state["truncation"] = state["padding"] = None
    known = [
        state,
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
        start_tokens(tokenizer),
        tokenizers.__version__,
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
    rows: Dataset, encode: Callable[..., dict], columns: dict[str, Any], flag: str, num_proc: int
) -> Tokenized:
    """Run `encode` over batches of rows in parallel, then leave out and count what it marked as dropped."""
    features = Features(**columns, length=Value("int32"), prompt_size=Value("int32"), fate=Value("int8"))
    if len(rows) == 0:  # of which `map` would make rows without columns
        return Tokenized(_empty(columns), num_cut=0, dropped={}, shortest_prompt=0)
    num_proc = max(min(num_proc, len(rows) // ROWS_A_PROCESS), 1)
    with _threads_allowed(num_proc == 1):
        marked = rows.map(
            encode,
            batched=True,
            remove_columns=rows.column_names,
            features=features,
            num_proc=num_proc if num_proc > 1 else None,
            new_fingerprint=uuid4().hex,  # the default would hash the tokenizer, slowly
            load_from_cache_file=False,
            desc="tokenising",
        )
    fates = column(marked, "fate")
    counts = Counter(fates.tolist())
    return Tokenized(
        rows=marked.select(np.flatnonzero(fates <= CUT)).remove_columns(["fate", "prompt_size"]),
        num_cut=counts[CUT],
        dropped={name.format(limit=flag): counts[fate] for fate, name in REASONS.items() if counts[fate]},
        shortest_prompt=int(column(marked, "prompt_size").min()),
    )


def _empty(columns: dict[str, Any]) -> Dataset:
    features = Features(**columns, length=Value("int32"))
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


def _sft_batch(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, max_seq_len: int, train_on_prompt: bool
) -> dict[str, list]:
    start = len(start_tokens(tokenizer))
    table = []
    for prompt, answer in zip(_prompts(batch, tokenizer), _answers(batch["chosen"], tokenizer), strict=True):
        (kept, shown), fate = _fit(prompt, [answer], max_seq_len, start)
        ids = kept + shown
        # Nothing precedes the first token, so nothing can predict it.
        num_targets = len(ids) - 1 if train_on_prompt else min(len(shown), len(ids) - 1)
        table.append((ids, len(kept), num_targets, len(ids), len(prompt), fate))
    return _columns(table, [*SFT_COLUMNS, "length", "prompt_size", "fate"])


def _pair_batch(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, max_seq_len: int
) -> dict[str, list]:
    start = len(start_tokens(tokenizer))
    answers = zip(_answers(batch["chosen"], tokenizer), _answers(batch["rejected"], tokenizer), strict=True)
    table = []
    for prompt, pair in zip(_prompts(batch, tokenizer), answers, strict=True):
        (kept, chosen, rejected), fate = _fit(prompt, pair, max_seq_len, start)
        if chosen == rejected and fate != LONG_PROMPT:
            fate = EQUAL_ANSWERS
        length = len(kept) + max(len(chosen), len(rejected))
        table.append((kept + chosen, kept + rejected, length, len(prompt), fate))
    return _columns(table, [*PAIR_COLUMNS, "length", "prompt_size", "fate"])


def _prompt_batch(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, max_prompt_seq_len: int
) -> dict[str, list]:
    table = []
    for ids in _prompts(batch, tokenizer):
        fate = NO_TOKEN if not ids else LONG_PROMPT if len(ids) > max_prompt_seq_len else KEPT
        table.append((ids, content_key(ids), len(ids), len(ids), fate))
    return _columns(table, [*PROMPT_COLUMNS, "length", "prompt_size", "fate"])


def content_key(ids: Sequence[int]) -> int:
    """A hash of token ids that fits int64: the name of a prompt for keyed sampling."""
    digest = xxhash.xxh3_64_digest(np.asarray(ids, dtype="<i4").tobytes())
    return int.from_bytes(digest, "big", signed=True)


def _prompts(batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Prompts with the tokenizer's start tokens, once, and no end token."""
    start = start_tokens(tokenizer)
    encoded = _encode(batch["prompt"], tokenizer)
    return [ids if start and ids[: len(start)] == start else start + ids for ids in encoded]


def _answers(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Answers with one end token, also where the text spells it out."""
    end = tokenizer.eos_token_id
    answers = []
    for ids in _encode(texts, tokenizer):
        while ids and ids[-1] == end:
            ids.pop()
        answers.append([*ids, end])
    return answers


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded["input_ids"]


def _fit(
    prompt: list[int], answers: Sequence[list[int]], max_seq_len: int, num_start: int
) -> tuple[list[list[int]], int]:
    """The prompt and its answers, prompt + any answer within `max_seq_len` tokens; and the row's fate.

    The prompt gives way from its left, after its `num_start` start tokens, and keeps its last token; only
    then are answers cut, and still end with their end token.
    """
    if len(prompt) > max_seq_len:
        return [prompt, *answers], LONG_PROMPT
    longest = max(map(len, answers))
    if len(prompt) + longest <= max_seq_len:
        return [prompt, *answers], KEPT
    num_kept = max(max_seq_len - longest - num_start, 1)
    prompt = prompt[:num_start] + prompt[num_start:][-num_kept:]
    room = max_seq_len - len(prompt)
    fitted = [answer if len(answer) <= room else answer[: room - 1] + answer[-1:] for answer in answers]
    return [prompt, *fitted], CUT


def _columns(table: list[tuple], names: list[str]) -> dict[str, list]:
    """Rows as columns."""
    return dict(zip(names, map(list, zip(*table, strict=True)), strict=True))
