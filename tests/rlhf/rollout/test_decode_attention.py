import pytest
import torch

from dschat.rlhf.rollout.decode_attention import decode_attention


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_it_is_torch_s_attention_with_as_many_queries_per_key_as_there_are(key_heads):
    torch.manual_seed(0)
    query = torch.randn(3, 4, 1, 8)
    key, value = torch.randn(2, 3, key_heads, 10, 8)
    hidden = torch.rand(3, 1, 1, 10) < 0.4
    hidden[..., 0] = False
    mask = torch.zeros(3, 1, 1, 10).masked_fill(hidden, torch.finfo(torch.float32).min)
    ours, weights = decode_attention(None, query, key, value, mask, scaling=0.5)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=~hidden, scale=0.5, enable_gqa=True
    )
    torch.testing.assert_close(ours, theirs.transpose(1, 2))
    assert weights is None


def test_what_would_change_the_result_is_refused():
    query, mask = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 3)
    key = torch.zeros(1, 1, 3, 2)
    for options in ({"softcap": 30.0}, {"s_aux": torch.zeros(1)}):
        with pytest.raises(ValueError, match=f"without .*{next(iter(options))}"):
            decode_attention(None, query, key, key, mask, **options)
    with pytest.raises(ValueError, match="of one query"):
        decode_attention(None, key, key, key, mask)
    with pytest.raises(ValueError, match="in fp32"):
        decode_attention(None, query, key, key, mask.bool())
