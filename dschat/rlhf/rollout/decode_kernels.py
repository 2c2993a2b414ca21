"""Attention of one query per row and the storing of its key and value, as Triton kernels for GPUs.

torch's kernels are made for many queries. On an H200 they took 1.2 (cuDNN), 2.7 and 2.3 times as long for
64 rows of 384 tokens as this one, which reads keys and values at 94 percent of the memory's bandwidth
(docs/performance.md). Triton comes with torch for GPUs; nothing imports this file where it is missing.
"""

# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from transformers import AttentionInterface

from dschat.rlhf.rollout.decode_attention import KERNEL_NAME, check_options

NOTHING: tl.constexpr = tl.constexpr(-1.0e38)
"""Less than every score, and more than what hides a column."""

TILE, WARPS = 64, 2
"""Columns that a program reads at once, and its warps: the fastest of five pairs on an H200."""


@triton.jit
def _attend(
    query, key, value, mask, result, row_stride, head_stride, column_stride, mask_stride, width, scaling,
    NUM_HEADS: tl.constexpr, SHARING: tl.constexpr, SIZE: tl.constexpr, ROUND_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """One head of one row: a softmax over its columns, tile by tile."""
    program = tl.program_id(0)
    row, head = program // NUM_HEADS, program % NUM_HEADS
    place = tl.arange(0, ROUND_SIZE)
    inside = place < SIZE
    scaled = tl.load(query + program * SIZE + place, mask=inside, other=0.0).to(tl.float32) * scaling
    start = row.to(tl.int64) * row_stride + (head // SHARING) * head_stride
    highest, total = NOTHING, 0.0
    sums = tl.zeros([ROUND_SIZE], tl.float32)
    for first in range(0, width, TILE):
        columns = first + tl.arange(0, TILE)
        hidden = tl.load(mask + row * mask_stride + columns, mask=columns < width, other=NOTHING)
        if tl.max(hidden, 0) > NOTHING:  # a tile of padding is not read
            offsets = start + columns[:, None] * column_stride + place[None, :]
            is_read = (columns < width)[:, None] & inside[None, :]
            keys = tl.load(key + offsets, mask=is_read, other=0.0).to(tl.float32)
            scores = tl.sum(keys * scaled[None, :], 1) + hidden
            higher = tl.maximum(highest, tl.max(scores, 0))
            weights = tl.exp(scores - higher)
            kept = tl.exp(highest - higher)
            values = tl.load(value + offsets, mask=is_read, other=0.0).to(tl.float32)
            sums = sums * kept + tl.sum(values * weights[:, None], 0)
            total = total * kept + tl.sum(weights, 0)
            highest = higher
    tl.store(result + program * SIZE + place, (sums / total).to(result.dtype.element_ty), mask=inside)


@triton.jit
def _store(
    keys, values, column, key, value, row_stride, head_stride, column_stride, key_row_stride, key_head_stride,
    value_row_stride, value_head_stride, NUM_HEADS: tl.constexpr, SIZE: tl.constexpr,
    ROUND_SIZE: tl.constexpr,
):  # fmt: skip
    """One head of one row."""
    program = tl.program_id(0)
    row, head = (program // NUM_HEADS).to(tl.int64), program % NUM_HEADS
    place = tl.arange(0, ROUND_SIZE)
    inside = place < SIZE
    target = row * row_stride + head * head_stride + tl.load(column) * column_stride + place
    new_key = tl.load(key + row * key_row_stride + head * key_head_stride + place, mask=inside)
    new_value = tl.load(value + row * value_row_stride + head * value_head_stride + place, mask=inside)
    tl.store(keys + target, new_key, mask=inside)
    tl.store(values + target, new_value, mask=inside)


def kernel_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`decode_attention` with the same arguments and results; products and sums are in fp32.

    Keys and values have the same strides, as those of a `DecodeCache`. Raises ValueError as that does.
    """
    mask = check_options(query, attention_mask, options)
    batch_size, num_heads, _, size = query.shape
    query = query.contiguous()
    result = torch.empty_like(query)
    _attend[(batch_size * num_heads,)](
        query, key, value, mask, result, *key.stride()[:3], mask.stride(0), key.shape[2],
        size**-0.5 if scaling is None else scaling, num_heads, num_heads // key.shape[1], size,
        1 << (size - 1).bit_length(), TILE, num_warps=WARPS,
    )  # fmt: skip
    return result.view(batch_size, 1, num_heads, size), None


def store_token(keys: Tensor, values: Tensor, column: Tensor, key: Tensor, value: Tensor) -> None:
    """Write the key and the value of a token of each row into that column of buffers.

    Buffers [B, K, W, D] of the same strides, column int64 [1], key and value [B, K, 1, D].
    """
    batch_size, num_heads, _, size = key.shape
    _store[(batch_size * num_heads,)](
        keys, values, column, key, value, *keys.stride()[:3], *key.stride()[:2], *value.stride()[:2],
        num_heads, size, 1 << (size - 1).bit_length(), num_warps=1,
    )  # fmt: skip


AttentionInterface.register(KERNEL_NAME, kernel_attention)
