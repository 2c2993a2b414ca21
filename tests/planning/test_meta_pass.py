"""What a pass holds and computes, told without weights."""

import pytest
import torch
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from dschat.models.reward_model import enable_gradient_checkpointing
from dschat.planning.meta_pass import PassShape, Rows, columns_of, pass_shape, with_layers

ROWS = Rows(2, 64, 64)


def build(family, num_layers=2):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            with_layers(tiny_config(family, 384), num_layers), dtype=torch.float32
        )


def shape(family: str = "llama", *, way: str = "sdpa", trains: bool = True, some: bool = False) -> PassShape:
    model = build(family)
    return pass_shape(
        model,
        2,
        columns=columns_of(model, way, ROWS.length),
        all_have_logits=not some,
        dtype=torch.float32,
        way=way,
        trains=trains,
    )


@pytest.mark.parametrize(
    ("family", "way"),
    [("llama", "eager"), ("opt", "eager"), ("qwen3_moe", "eager"), ("gptj", "sdpa"), ("bloom", "eager")],
)
def test_what_is_kept_is_what_autograd_keeps_of_rows_of_another_length(family, way):
    model = AutoModelForCausalLM.from_config(tiny_config(family, 384), attn_implementation="eager").train()
    if family == "qwen3_moe":
        model.set_experts_implementation("grouped_mm")
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    held = []

    def keep(tensor):
        storage = tensor.untyped_storage()
        held.append(tensor)  # so that no later storage takes its place
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(2, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    planned = shape(family, way=way).kept(ROWS)
    assert planned == pytest.approx(sum(kept.values()) + 4 * logits.numel(), rel=0.06)


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_activations_are_in_proportion_to_rows_and_logits_are_where_they_are_asked_for(family):
    whole, some = shape(family), shape(family, some=True)
    assert whole.peak(Rows(4, 64, 64)) == 2 * whole.peak(ROWS)
    assert whole.logits is not None
    assert whole.logits.size(ROWS) == 2 * 64 * 384 * 4
    fewer = Rows(2, 64, 16)
    assert some.logits is not None
    assert some.logits.size(fewer) == 2 * 16 * 384 * 4
    # 48 positions of two rows fewer: their logits, and the hidden states that the head reads
    assert whole.kept(ROWS) - some.kept(fewer) == 2 * 48 * (384 + 32) * 4


def test_passes_that_keep_nothing_take_less_and_eager_attention_keeps_probabilities():
    assert shape(way="eager").kept(ROWS) > shape().kept(ROWS)
    assert shape(trains=False).peak(ROWS) < shape().peak(ROWS)
    assert not shape(trains=False).layer


def test_a_layer_more_adds_what_the_second_added():
    four = pass_shape(
        build("llama"), 4, columns=251, all_have_logits=True, dtype=torch.float32, way="sdpa", trains=True
    )
    # Of a layer of width 32 with 64 wide: the norms' inputs, q, k, v twice over (before rotation and after),
    # attention's output and the products' inputs; 2 x 64 tokens.
    added = (four.kept(ROWS) - shape().kept(ROWS)) / 2
    assert 2 * 64 * 4 * (8 * 32 + 3 * 64) < added < 2 * 64 * 4 * (20 * 32 + 6 * 64)
    assert four.peak(ROWS) - shape().peak(ROWS) == pytest.approx(2 * added)


def test_recomputed_layers_leave_their_inputs_alone():
    model = build("llama")
    enable_gradient_checkpointing(model)
    found = pass_shape(
        model, 2, columns=251, all_have_logits=True, dtype=torch.float32, way="sdpa", trains=True
    )
    assert sum(block.size(ROWS) * number for block, number in found.layer.items()) == 2 * 64 * 32 * 4
