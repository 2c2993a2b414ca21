"""Triton's kernels beside torch. Without a GPU: TRITON_INTERPRET=1, where Triton is installed."""

import os

import pytest
import torch

from dschat.rlhf.rollout.decode_attention import decode_attention

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

from dschat.rlhf.rollout.decode_kernels import kernel_attention, store_token

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(3, 4, 4, 16, 32, 64), (2, 6, 2, 24, 96, 96), (2, 8, 1, 64, 160, 192)]


def buffers(batch: int, heads: int, size: int, capacity: int, dtype: torch.dtype) -> torch.Tensor:
    """Keys and values [2, B, K, W, D]."""
    torch.manual_seed(0)
    return torch.randn(2, batch, heads, capacity, size).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "heads", "key_heads", "size", "width", "capacity"), SIZES)
def test_attention_is_that_of_two_products(batch, heads, key_heads, size, width, capacity, dtype):
    keys, values = buffers(batch, key_heads, size, capacity, dtype)[..., :width, :]
    query = torch.randn(batch, heads, 1, size).to(DEVICE, dtype)
    mask = torch.zeros(batch, 1, 1, capacity, device=DEVICE)
    mask[0, ..., :7] = mask[..., width - 3 :] = torch.finfo(torch.float32).min
    mask = mask[..., :width]
    for scaling in (None, 0.3):
        found, _ = kernel_attention(torch.nn.Identity(), query, keys, values, mask, scaling)
        wide = (tensor.float() for tensor in (query, keys, values))
        expected, _ = decode_attention(torch.nn.Identity(), *wide, mask, scaling)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("batch", "heads", "key_heads", "size", "width", "capacity"), SIZES)
def test_a_token_is_stored_in_its_column_alone(batch, heads, key_heads, size, width, capacity):
    keys, values = buffers(batch, key_heads, size, capacity, torch.bfloat16)
    expected = keys.clone(), values.clone()
    column = torch.tensor([5], device=DEVICE)
    fused = torch.randn(batch, 1, 3 * key_heads * size).to(keys)
    parts = fused.split(key_heads * size, dim=-1)[1:]
    key, value = (part.view(batch, 1, key_heads, size).transpose(1, 2) for part in parts)
    store_token(keys, values, column, key, value)
    for buffer, states, found in zip(expected, (key, value), (keys, values), strict=True):
        assert torch.equal(buffer.index_copy_(2, column, states), found)


def test_what_the_kernel_is_not_made_for_is_refused():
    query, mask = torch.zeros(1, 1, 2, 16, device=DEVICE), torch.zeros(1, 1, 1, 4, device=DEVICE)
    with pytest.raises(ValueError, match="one query"):
        kernel_attention(torch.nn.Identity(), query, query, query, mask)
