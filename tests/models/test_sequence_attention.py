import pytest
import torch
from tiny import tiny_config
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dschat.models.sequence_attention import ULYSSES, _causal_sdpa, shares_rows


def test_a_model_shares_rows_by_its_own_configuration_alone(monkeypatch):
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    models = [AutoModelForCausalLM.from_config(tiny_config("llama", 64)) for _ in range(2)]
    models[0].config._attn_implementation = ULYSSES
    assert [shares_rows(model) for model in models] == [True, False]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention


@pytest.mark.parametrize("window", [None, 3, 8])
def test_a_token_sees_no_further_back_than_a_sliding_window(window):
    query, key, value = torch.randn(3, 1, 2, 8, 4).unbind()
    output, _ = _causal_sdpa(torch.nn.Module(), query, key, value, None, sliding_window=window)
    columns = torch.arange(8)
    distance = columns[:, None] - columns
    scores = query @ key.transpose(2, 3) / 2
    scores = scores.masked_fill((distance < 0) | (distance >= (window or 8)), -torch.inf)
    torch.testing.assert_close(output, (scores.softmax(-1) @ value).transpose(1, 2))
