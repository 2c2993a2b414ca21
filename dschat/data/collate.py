"""Rows of token ids to tensors. Masks are made here, from lengths, and carried from here on.

B rows of a batch, L its longest, P its longest prompt. A batch always has B rows: where the data run out,
fillers take their place, one pad token each that is attended and counts for nothing.
"""

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

Batch = TypeVar("Batch", "SftBatch", "PairBatch", "PromptBatch")

REFERENCE_COLUMNS = ("chosen_ref_logprob", "rejected_ref_logprob")
"""What `dschat.supervised.reference_logprobs` adds to pairs: their answers' log-probabilities, in nats."""


@dataclass(frozen=True)
class SftBatch:
    """Prompts and answers, padded on the right."""

    input_ids: Tensor
    """[B, L] int64."""
    attention_mask: Tensor
    """[B, L] int64: 1 on tokens, 0 on padding."""
    loss_mask: Tensor
    """[B, L] bool: True on each token to be learned, predicted one position earlier; never on the first."""
    denominator: float
    """Tokens to be learned in the whole optimiser step, over all ranks and micro-batches."""

    def to(self, device: torch.device | str) -> "SftBatch":
        """The batch on that device."""
        return _moved(self, device)


@dataclass(frozen=True)
class PairBatch:
    """B pairs, padded on the right: the chosen rows, then in the same order the rejected ones."""

    input_ids: Tensor
    """[2B, L] int64."""
    attention_mask: Tensor
    """[2B, L] int64: 1 on tokens, 0 on padding."""
    answer_mask: Tensor
    """[2B, L] bool: True on the tokens of the answer, its end token included; never on the first of a row."""
    pair_mask: Tensor
    """[B] float32: 1 for a pair, 0 for a filler."""
    weights: Tensor
    """[B] float32: what a pair counts in the loss; those of one prompt count 1 together. 0 for a filler."""
    groups: Tensor
    """[B] int64: a number that the pairs of one prompt have in common; -1 for a filler."""
    margins: Tensor
    """[B] float32: by how much the chosen answer is to be better."""
    denominator: float
    """The sum of the weights in the whole optimiser step, over all ranks and micro-batches."""
    ref_logprobs: Tensor | None = None
    """[2B] float32: the reference model's log-probability of each answer, where the rows have it (DPO)."""

    def to(self, device: torch.device | str) -> "PairBatch":
        """The batch on that device."""
        return _moved(self, device)


@dataclass(frozen=True)
class PromptBatch:
    """Prompts, padded on the LEFT, so that answers continue all of them at one position."""

    input_ids: Tensor
    """[B, P] int64."""
    attention_mask: Tensor
    """[B, P] int64: 0 on padding, 1 on tokens."""
    keys: Tensor
    """[B] int64: a hash of the prompt's tokens."""
    rows: Tensor
    """[B] int64: the prompt's row in its data set; -1 for a filler."""
    samples: Tensor
    """[B] int64: how often the prompt came before; with its key it names an answer. -1 for a filler."""

    def to(self, device: torch.device | str) -> "PromptBatch":
        """The batch on that device."""
        return _moved(self, device)


def collate_sft(rows: pa.Table, num_rows: int, denominator: float, *, pad_id: int) -> SftBatch:
    """The rows of `tokenize_sft` and fillers, `num_rows` together."""
    flat, lengths = _filled(rows["input_ids"], num_rows, pad_id)
    input_ids, attention_mask = _padded(flat, lengths, pad_id)
    loss_mask = np.zeros_like(attention_mask)
    flat_mask = rows["loss_mask"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    loss_mask[: rows.num_rows][attention_mask[: rows.num_rows]] = flat_mask
    return SftBatch(_integers(input_ids), _integers(attention_mask), torch.from_numpy(loss_mask), denominator)


def collate_pairs(rows: pa.Table, num_rows: int, denominator: float, *, pad_id: int) -> PairBatch:
    """The rows of `tokenize_pairs` and fillers, `num_rows` pairs together.

    REFERENCE_COLUMNS, where the rows have them, become the batch's `ref_logprobs`.
    """
    halves = [_filled(rows[name], num_rows, pad_id) for name in ("chosen_ids", "rejected_ids")]
    flat, lengths = (np.concatenate(parts) for parts in zip(*halves, strict=True))
    input_ids, attention_mask = _padded(flat, lengths, pad_id)
    # Nothing precedes the first token, so nothing can predict it; a filler has no other.
    starts = np.tile(np.maximum(_extended(rows["prompt_length"], num_rows, 1), 1), 2)
    answer_mask = attention_mask & (np.arange(attention_mask.shape[1]) >= starts[:, None])

    def numbers(name: str) -> Tensor:
        return torch.from_numpy(_extended(rows[name], num_rows, 0.0)).float()

    has_reference = set(REFERENCE_COLUMNS) <= set(rows.column_names)
    return PairBatch(
        input_ids=_integers(input_ids),
        attention_mask=_integers(attention_mask),
        answer_mask=torch.from_numpy(answer_mask),
        pair_mask=(torch.arange(num_rows) < rows.num_rows).float(),
        weights=numbers("weight"),
        groups=_integers(_extended(rows["group"], num_rows, -1)),
        margins=numbers("margin"),
        denominator=denominator,
        ref_logprobs=torch.cat([numbers(name) for name in REFERENCE_COLUMNS]) if has_reference else None,
    )


def collate_prompts(
    rows: pa.Table,
    num_rows: int,
    denominator: float = 1.0,
    *,
    pad_id: int,
    numbers: np.ndarray | None = None,
    samples: np.ndarray | None = None,
) -> PromptBatch:
    """The rows of `tokenize_prompts` and fillers; `numbers` are the rows' in their data set, `samples` their
    answers', both 0 by default.

    There is no loss, hence no use for the denominator.
    """
    flat, lengths = _filled(rows["input_ids"], num_rows, pad_id)
    input_ids, attention_mask = _padded(flat, lengths, pad_id, left=True)
    keys = _extended(rows["key"], num_rows, 0)

    def per_row(values: np.ndarray | None) -> Tensor:
        column = np.full(num_rows, -1, dtype=np.int64)
        column[: rows.num_rows] = 0 if values is None else values
        return _integers(column)

    return PromptBatch(
        _integers(input_ids), _integers(attention_mask), _integers(keys), per_row(numbers), per_row(samples)
    )


def _moved(batch: Batch, device: torch.device | str) -> Batch:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    tensors = {
        name: value.to(device, non_blocking=True)
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
    return replace(batch, **tensors)


def _filled(tokens: pa.ChunkedArray, num_rows: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """All tokens in one array, and the length of each of `num_rows` rows, fillers of one pad token last."""
    lists = tokens.combine_chunks()
    flat, lengths = lists.flatten().to_numpy(), lists.value_lengths().to_numpy()
    num_fillers = num_rows - len(lengths)
    assert num_fillers >= 0, f"{len(lengths)} rows do not fit a batch of {num_rows}"
    return np.append(flat, [pad_id] * num_fillers), np.append(lengths, [1] * num_fillers)


def _extended(numbers: pa.ChunkedArray, num_rows: int, filler: float) -> np.ndarray:
    values = numbers.to_numpy()
    return np.append(values, np.full(num_rows - len(values), filler, dtype=values.dtype))


def _padded(
    flat: np.ndarray, lengths: np.ndarray, pad_id: int, left: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Rows one after the other in `flat` as ids [B, L] with a mask [B, L] of what is no padding."""
    longest = int(lengths.max())
    positions = np.arange(longest)
    mask = positions >= longest - lengths[:, None] if left else positions < lengths[:, None]
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = flat
    return ids, mask


def _integers(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))
