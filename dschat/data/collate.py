"""Rows of token ids to tensors. Masks are made here, from lengths, and carried from here on.

B rows of a batch, L its longest, P its longest prompt. A batch always has B rows: where the data run out,
fillers take their place, one pad token each that is attended and counts for nothing.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dschat.data.moving import moved
from dschat.data.packing import PADDED, RowLayout
from dschat.data.rows import array_of
from dschat.data.token_batch import TokenBatch

REFERENCE_COLUMNS = ("chosen_ref_logprob", "rejected_ref_logprob")
"""What `dschat.supervised.reference_logprobs` adds to pairs: their answers' log-probabilities, in nats."""


@dataclass(frozen=True)
class SftBatch:
    """Prompts and answers, padded on the right."""

    tokens: TokenBatch
    """B rows. The labels that count are the tokens to be learned."""
    denominator: float
    """Tokens to be learned in the whole optimiser step, over all ranks and micro-batches."""

    def to(self, device: torch.device | str) -> "SftBatch":
        """The batch on that device."""
        return moved(self, device)


@dataclass(frozen=True)
class PairBatch:
    """B pairs, padded on the right: the chosen rows, then in the same order the rejected ones."""

    tokens: TokenBatch
    """2B rows. The labels that count are the tokens of the answers, their end tokens included."""
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
        return moved(self, device)


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
        return moved(self, device)


def collate_sft(
    rows: pa.Table, num_rows: int, denominator: float, *, pad_id: int, layout: RowLayout = PADDED
) -> SftBatch:
    """The rows of `tokenize_sft` and fillers, `num_rows` together, laid out for a model."""
    flat, lengths = _filled(rows["input_ids"], num_rows, pad_id)
    input_ids, attention_mask = _padded(flat, lengths, pad_id, width=int(lengths.max()))
    loss_mask = np.zeros_like(attention_mask)
    flat_mask = array_of(rows["loss_mask"].combine_chunks().flatten())
    loss_mask[: rows.num_rows][attention_mask[: rows.num_rows]] = flat_mask
    return SftBatch(_token_batch(input_ids, attention_mask, loss_mask).placed(layout), denominator)


def collate_pairs(
    rows: pa.Table, num_rows: int, denominator: float, *, pad_id: int, layout: RowLayout = PADDED
) -> PairBatch:
    """The rows of `tokenize_pairs` and fillers, `num_rows` pairs together, laid out for a model.

    REFERENCE_COLUMNS, where the rows have them, become the batch's `ref_logprobs`.
    """
    halves = [_filled(rows[name], num_rows, pad_id) for name in ("chosen_ids", "rejected_ids")]
    flat, lengths = (np.concatenate(parts) for parts in zip(*halves, strict=True))
    input_ids, attention_mask = _padded(flat, lengths, pad_id, width=int(lengths.max()))
    starts = np.tile(_extended(rows["prompt_length"], num_rows, 1), 2)
    answer_mask = attention_mask & (np.arange(attention_mask.shape[1]) >= starts[:, None])

    def numbers(name: str) -> Tensor:
        return torch.from_numpy(_extended(rows[name], num_rows, 0.0)).float()

    has_reference = set(REFERENCE_COLUMNS) <= set(rows.column_names)
    return PairBatch(
        tokens=_token_batch(input_ids, attention_mask, answer_mask).placed(layout),
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
    multiple_of: int = 1,
    numbers: np.ndarray | None = None,
    samples: np.ndarray | None = None,
) -> PromptBatch:
    """The rows of `tokenize_prompts` and fillers; `numbers` are the rows' in their data set, `samples` their
    answers', both 0 by default. Their width is a multiple of `multiple_of`.

    There is no loss, hence no use for the denominator.
    """
    flat, lengths = _filled(rows["input_ids"], num_rows, pad_id)
    width = RowLayout(multiple_of).rounded(int(lengths.max()))
    input_ids, attention_mask = _padded(flat, lengths, pad_id, width=width, left=True)
    keys = _extended(rows["key"], num_rows, 0)

    def per_row(values: np.ndarray | None) -> Tensor:
        column = np.full(num_rows, -1, dtype=np.int64)
        column[: rows.num_rows] = 0 if values is None else values
        return _integers(column)

    return PromptBatch(
        _integers(input_ids), _integers(attention_mask), _integers(keys), per_row(numbers), per_row(samples)
    )


def collate_text(blocks: np.ndarray) -> TokenBatch:
    """Blocks of text [B, L + 1]: L tokens to read, each of which predicts the next."""
    tokens = _integers(blocks)
    return TokenBatch.of(tokens, torch.ones_like(tokens, dtype=torch.bool), reads_last=False)


def _token_batch(input_ids: np.ndarray, attention_mask: np.ndarray, is_label: np.ndarray) -> TokenBatch:
    """Rows [B, L] with labels from the first column on that has one: what stands before needs no logits."""
    first = int(is_label.any(axis=0).argmax())
    return TokenBatch.of(
        _integers(input_ids), torch.from_numpy(is_label[:, first:]), attention_mask=_integers(attention_mask)
    )


def _filled(tokens: pa.ChunkedArray, num_rows: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """All tokens in one array, and the length of each of `num_rows` rows, fillers of one pad token last."""
    lists = tokens.combine_chunks()
    flat, lengths = array_of(lists.flatten()), array_of(lists.value_lengths())
    num_fillers = num_rows - len(lengths)
    assert num_fillers >= 0, f"{len(lengths)} rows do not fit a batch of {num_rows}"
    return np.append(flat, [pad_id] * num_fillers), np.append(lengths, [1] * num_fillers)


def _extended(column: pa.ChunkedArray, num_rows: int, filler: float) -> np.ndarray:
    values = array_of(column)
    return np.append(values, np.full(num_rows - len(values), filler, dtype=values.dtype))


def _padded(
    flat: np.ndarray, lengths: np.ndarray, pad_id: int, *, width: int, left: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Rows one after the other in `flat` as ids [B, width] with a mask [B, width] of what is no padding."""
    positions = np.arange(width)
    mask = positions >= width - lengths[:, None] if left else positions < lengths[:, None]
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = flat
    return ids, mask


def _integers(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))
