"""Attention of one query per row, as two matrix products.

torch's attention kernels on a CPU are made for many queries. With one they took 3 to 6 times as long as the
products and the softmax (docs/performance.md).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "dschat_decode"
"""What `config._attn_implementation` is set to for it."""

KERNEL_NAME = "dschat_decode_kernel"
"""The same for the kernel in `decode_kernels.py`, a file that cannot be imported everywhere."""

UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Options of transformers' attention functions that change what is computed."""


def decode_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """[B, H, 1, D], [B, K, W, D], [B, K, W, D], mask [B, 1, 1, W] -> [B, 1, H, D]; K divides H.

    The mask is fp32, to be added. Softmax is fp32 whatever the precision. Raises ValueError for what an
    architecture asks for besides.
    """
    mask = check_options(query, attention_mask, options)
    batch_size, num_heads, _, size = query.shape
    num_groups = key.shape[1]
    query = query.reshape(batch_size, num_groups, num_heads // num_groups, size)
    scores = torch.matmul(query, key.transpose(2, 3)) * (size**-0.5 if scaling is None else scaling)
    weights = (scores + mask).softmax(dim=-1).to(value.dtype)  # the sum is fp32, as the mask is
    return torch.matmul(weights, value).view(batch_size, 1, num_heads, size), None


def check_options(query: Tensor, attention_mask: Tensor | None, options: dict[str, Any]) -> Tensor:
    """The mask. Raises ValueError for what attention of one query per row is not made for."""
    asked_for = [name for name in UNSUPPORTED if options.get(name) is not None]
    if asked_for or query.shape[2] != 1 or attention_mask is None or attention_mask.dtype != torch.float32:
        raise ValueError(
            f"attention of one query, with a mask in fp32 and without {asked_for}, is all there is"
        )
    return attention_mask


AttentionInterface.register(NAME, decode_attention)
