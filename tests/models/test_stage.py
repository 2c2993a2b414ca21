"""Stages of a pipeline: each reads its own layers alone, and together they compute what the model does."""

import pytest
import torch
from tiny import FAMILIES, save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from dschat.arguments import ModelArguments
from dschat.data.token_batch import TokenBatch
from dschat.distributed.mesh import Axis
from dschat.errors import UserError
from dschat.models.forward import hidden_states_of, logits_of, scores_of
from dschat.models.loading import create_critic_model, create_hf_model
from dschat.models.lora import add_lora, add_lora_to_stage, lora_config
from dschat.models.preflight import meta_model
from dschat.models.stage import check_stages, continue_from, own_layers, tied_embedding

STAGES = (Axis(0, 2), Axis(1, 2))


def batch() -> TokenBatch:
    """Two rows, the second one padded."""
    ids = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return TokenBatch.of(ids, mask.bool(), attention_mask=mask)


ORDINARY = ("llama", "qwen3", "opt_projected", "gpt2", "gpt_neox")


@pytest.mark.parametrize(
    "family",
    [name if name in ORDINARY else pytest.param(name, marks=pytest.mark.matrix) for name in FAMILIES],
)
@torch.no_grad()
def test_two_stages_compute_what_the_whole_model_does(tmp_path, family):
    path, tokenizer = str(save_tiny_model(tmp_path, family)), tiny_tokenizer()
    kinds = (
        (lambda **stage: create_hf_model(AutoModelForCausalLM, path, tokenizer, **stage), logits_of),
        (lambda **stage: create_critic_model(path, tokenizer, None, **stage), scores_of),
    )
    for create, compute in kinds:
        torch.manual_seed(0)
        whole = create()
        torch.manual_seed(0)
        first, last = (create(stage=stage) for stage in STAGES)
        continue_from(last, hidden_states_of(first, batch()))
        assert torch.equal(compute(last, batch()), compute(whole, batch()))
        names = [name for part in (first, last) for name, _ in part.named_parameters()]
        tied = ["lm_head.weight"] if tied_embedding(whole, Axis()) is not None else []
        assert sorted(names) == sorted([name for name, _ in whole.named_parameters()] + tied)


def test_new_tokens_get_the_same_rows_in_stages(tmp_path):
    path = str(save_tiny_model(tmp_path, "llama", vocab_size=380))
    whole, first, last = (
        create_hf_model(AutoModelForCausalLM, path, tiny_tokenizer(), stage=stage)
        for stage in (None, *STAGES)
    )
    assert torch.equal(first.get_input_embeddings().weight, whole.get_input_embeddings().weight)
    assert torch.equal(last.lm_head.weight, whole.lm_head.weight)


@pytest.mark.parametrize(("num_layers", "size"), [(7, 3), (4, 4), (5, 1)])
def test_every_layer_is_in_one_stage(num_layers, size):
    parts = [own_layers(num_layers, Axis(rank, size)) for rank in range(size)]
    assert [layer for part in parts for layer in part] == list(range(num_layers))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_more_stages_than_layers_and_parts_of_unknown_place_are_refused(tmp_path):
    model = meta_model(str(save_tiny_model(tmp_path)), is_reward_model=False)
    with pytest.raises(UserError, match=r"--pipeline_parallel_size 3 is more than the model's 2 layers"):
        check_stages(model, 3, lambda _: [])
    with pytest.raises(UserError, match="new to the model"):
        check_stages(model, 2, lambda _: [7])
    model.model.mixer = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="'llama' model: in which stage mixer belongs is not known"):
        check_stages(model, 2, lambda _: [])


@pytest.mark.parametrize("only_optimize_lora", [False, True])
def test_stages_get_the_adapters_that_their_layers_have_in_the_whole_model(tmp_path, only_optimize_lora):
    path = str(save_tiny_model(tmp_path))
    args = ModelArguments(model_name_or_path=path, lora_dim=4, lora_module_name="q_proj,down_proj")
    whole = create_hf_model(AutoModelForCausalLM, path, tiny_tokenizer())
    parts = [create_hf_model(AutoModelForCausalLM, path, tiny_tokenizer(), stage=stage) for stage in STAGES]
    torch.manual_seed(0)
    add_lora(whole, args, only_optimize_lora=only_optimize_lora)
    for part in parts:
        torch.manual_seed(0)
        add_lora_to_stage(part, args, only_optimize_lora=only_optimize_lora)
        assert lora_config(part) == lora_config(whole)
    expected = {name: (p.requires_grad, p.tolist()) for name, p in whole.named_parameters()}
    found = {name: (p.requires_grad, p.tolist()) for part in parts for name, p in part.named_parameters()}
    assert found == expected
