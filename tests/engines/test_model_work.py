"""Operations are counted from a model's sizes; the numbers are made by hand."""

import pytest
import torch
from tiny import tiny_config
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, OPTConfig

from dschat.arguments import ModelArguments
from dschat.data.token_batch import TokenBatch
from dschat.engines.model_work import ModelWork, Rows
from dschat.models.lora import add_lora
from dschat.models.reward_model import RewardModel

FAMILIES = [
    "gpt2",
    "gpt_neox",
    "phi",
    "gptj",
    "bloom",
    "falcon",
    "gemma",
    "opt_projected",
    "mixtral",
    "qwen3_moe",
]
ROWS = Rows(tokens=10.0, squares=52.0, labels=3.0)
"""A row of 4 tokens and one of 6, three of them predicted."""
LLAMA = LlamaConfig(
    vocab_size=50,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=False,
)
# Of a layer: q and o 8 x 8, k and v 8 x 4, three of 8 x 16, two norms of 8; then the last norm.
LLAMA_BODY = 2 * (2 * 64 + 2 * 32 + 3 * 128 + 16) + 8


def test_a_batch_is_counted_without_its_padding():
    tokens = torch.ones(2, 6, dtype=torch.int64)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    labels = torch.tensor([[False, True, False], [False, True, True]])
    batch = TokenBatch.of(tokens, labels, attention_mask=mask)
    assert {name: count.item() for name, count in Rows.counted(batch).items()} == vars(ROWS)
    filled = TokenBatch.of(
        torch.cat([tokens, tokens[:1]]),
        torch.cat([labels, torch.zeros(1, 3, dtype=torch.bool)]),
        attention_mask=torch.cat([mask, torch.tensor([[1, 0, 0, 0, 0, 0]])]),
    )
    assert {name: count.item() for name, count in Rows.counted(filled).items()} == vars(ROWS)
    whole = Rows.counted(TokenBatch.of(tokens, labels))
    assert (whole["tokens"].item(), whole["squares"].item()) == (12, 72)


def test_a_model_trained_whole_takes_6_operations_per_weight_and_token():
    work = ModelWork.of(AutoModelForCausalLM.from_config(LLAMA))
    assert (work.body, work.trained_body) == (LLAMA_BODY, LLAMA_BODY)
    assert (work.head, work.trained_head) == (400, 400)
    assert work.attention == 2 * 2 * 4
    # The head meets three labels. Attention: 6 x 16 over the squares, half of PaLM's 12, as it is causal.
    assert work.training(ROWS) == 6 * (LLAMA_BODY * 10 + 400 * 3) + 6 * 16 * 52
    assert work.forward(ROWS) == work.training(ROWS) / 3


def test_a_tied_head_counts_and_embeddings_do_not():
    config = OPTConfig(
        vocab_size=50,
        hidden_size=8,
        ffn_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        word_embed_proj_dim=8,
    )
    work = ModelWork.of(AutoModelForCausalLM.from_config(config))
    # Four projections of 8 x 8 + 8, two of 8 x 16 with 16 and 8, three norms of 2 x 8.
    assert work.body == 4 * 72 + 2 * 128 + 24 + 3 * 16
    assert work.head == 400


def test_frozen_weights_take_4_operations_and_adapters_6():
    model = AutoModelForCausalLM.from_config(LLAMA)
    add_lora(model, ModelArguments(model_name_or_path="m", lora_dim=2), only_optimize_lora=True)
    work = ModelWork.of(model)
    # Rank 2 beside q and o (2 x 16), k and v (2 x 12), and three of 2 x 24, in two layers.
    adapters = 2 * 2 * (2 * 16 + 2 * 12 + 3 * 24)
    assert (work.body, work.trained_body, work.trained_head) == (LLAMA_BODY + adapters, adapters, 0)
    expected = 4 * (LLAMA_BODY * 10 + 400 * 3) + 6 * adapters * 10 + 6 * 16 * 52
    assert work.training(ROWS) == expected


def test_of_experts_those_count_that_a_token_goes_through():
    sizes = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    one, four = (
        ModelWork.of(
            AutoModelForCausalLM.from_config(
                MixtralConfig(**sizes, **heads, num_local_experts=number, num_experts_per_tok=1)
            )
        )
        for number in (1, 4)
    )
    assert four.body == pytest.approx(one.body + 3 * 8)  # three further rows of the router


def test_a_reward_model_has_one_output_per_row():
    backbone = AutoModelForCausalLM.from_config(LLAMA).model
    model = RewardModel(backbone, torch.nn.Linear(8, 1, bias=False), LLAMA)
    work = ModelWork.of(model)
    assert (work.head, work.body) == (0, LLAMA_BODY + 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_sizes(family):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family, 384))
    work = ModelWork.of(model)
    in_layers = sum(p.numel() for name, p in model.named_parameters() if ".0." in name)
    assert work.attention == 2 * 32
    assert work.body > 2 * in_layers * (0.4 if "moe" in family or family == "mixtral" else 1)
    assert work.head >= 384 * 16
