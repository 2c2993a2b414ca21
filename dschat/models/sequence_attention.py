"""Attention where ranks share the tokens of rows: DeepSpeed-Ulysses, https://arxiv.org/abs/2309.14509.

Each rank computes its part of the tokens in every layer but attention. There the ranks exchange what they
have: each gets all tokens of a share of the heads, attends, and gives the outputs back. `ULYSSES` is a name
of its own in transformers' tables, so models without it, in the same process, attend as they did.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dschat.distributed.collectives import group_of
from dschat.distributed.mesh import mesh

ULYSSES = "dschat_ulysses"
"""What `config._attn_implementation` is set to for it; a saved config.json has none."""


def shares_rows(model: Any) -> bool:
    """Whether an engine or a module attends in this way, and so reads one rank's part of each row."""
    config = getattr(getattr(model, "module", model), "config", None)
    return getattr(config, "_attn_implementation", None) == ULYSSES


def ulysses_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers calls it, of this rank's tokens: queries [B, H, L, D], keys and
    values [B, G, L, D] -> [B, L, H, D] and None.

    Padding is on the right, where causal attention needs no mask: `attention_mask` is None.
    """
    num_rows, num_heads, width, size = query.shape
    exchange = _exchange(num_rows, num_heads, key.shape[1], size, group_of("sequence"))
    first = mesh().sequence.rank * width
    positions = torch.arange(first, first + width, device=query.device).expand(num_rows, -1).contiguous()
    output, _ = exchange(module, query, key, value, None, **{**options, "position_ids": positions})
    return output.unflatten(-1, (num_heads, size)), None


@functools.cache
def _exchange(
    num_rows: int, num_heads: int, num_key_heads: int, size: int, group: dist.ProcessGroup
) -> UlyssesSPAttentionHF:
    """DeepSpeed's module for such queries and keys, of rows of any width."""
    return UlyssesSPAttentionHF(
        attn=_causal_sdpa,
        batch_size=num_rows,
        attn_head_count=num_heads,
        attn_head_size=size,
        kv_head_count=num_key_heads,
        num_hidden_layers=1,  # read in a mode for debugging alone
        process_group=group,
        seq_length_is_variable=True,
    )


def _causal_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """SDPA of whole rows, which needs a mask for a sliding window narrower than they are."""
    width = query.shape[2]
    if sliding_window is not None and sliding_window < width:
        attention_mask = _window(width, sliding_window, query.device)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


@functools.lru_cache(maxsize=1)  # all layers of a pass have the same
def _window(width: int, sliding_window: int, device: torch.device) -> Tensor:
    """Which tokens see which: themselves and the `sliding_window` - 1 before them. -> bool [1, 1, W, W]."""
    seen = torch.ones(width, width, dtype=torch.bool, device=device)
    return seen.tril().triu(1 - sliding_window)[None, None]


def _no_mask(*args: Any, **options: Any) -> None:
    """In place of a mask, which would be of a part of the tokens."""


AttentionInterface.register(ULYSSES, ulysses_attention)
AttentionMaskInterface.register(ULYSSES, _no_mask)
