import re

import torch
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from dschat.arguments import ModelArguments
from dschat.models.lora import add_lora
from dschat.rlhf.rollout.fused_projections import FusedProjections


def names(projections: FusedProjections, model) -> list[str]:
    """Of the layers that are computed together."""
    by_id = {id(module): name for name, module in model.named_modules()}
    return [by_id[id(layer)].rpartition(".")[2] for group in projections._groups for layer in group.layers]


def model_of(family: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(family, 100)).eval()


@torch.no_grad()
def test_the_model_computes_the_same_and_is_left_as_it_was():
    for family, expected in (("llama", 3), ("opt", 3), ("qwen2", 3), ("gpt2", 0)):
        model = model_of(family)
        projections = FusedProjections(model)
        assert len(names(projections, model)) == expected * model.config.num_hidden_layers
        projections.refresh()
        ids = torch.arange(12).view(2, 6)
        alone = model(ids).logits
        with projections.in_place():
            torch.testing.assert_close(model(ids).logits, alone, rtol=0, atol=1e-6)
        assert not any("forward" in vars(module) for module in model.modules())
        assert torch.equal(model(ids).logits, alone)


@torch.no_grad()
def test_copies_are_refreshed_in_their_memory():
    model = model_of("llama")
    projections = FusedProjections(model)
    projections.refresh()
    places = [copy.data_ptr() for group in projections._groups for copy in group.copies]
    for parameter in model.parameters():
        parameter.mul_(2)
    projections.refresh()
    assert places == [copy.data_ptr() for group in projections._groups for copy in group.copies]
    ids = torch.arange(12).view(2, 6)
    alone = model(ids).logits
    with projections.in_place():
        torch.testing.assert_close(model(ids).logits, alone, rtol=0, atol=1e-5)
    fused = re.compile(r"\.(q|k|v)_proj\.")
    assert projections.size == sum(p.nbytes for name, p in model.named_parameters() if fused.search(name))
    projections.free()
    assert projections.size == 0


def test_adapted_layers_keep_their_own_products(tmp_path):
    model = model_of("llama")
    add_lora(
        model, ModelArguments(model_name_or_path=str(tmp_path), lora_dim=4, lora_module_name="self_attn.")
    )
    projections = FusedProjections(model)
    assert names(projections, model) == []
