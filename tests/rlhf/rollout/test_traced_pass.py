import copy

import pytest
import torch
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from dschat.data.collate import PromptBatch
from dschat.rlhf.rollout.decode_modes import MODES, Decoding
from dschat.rlhf.rollout.traced_pass import TracedPass, can_be_traced


@pytest.fixture(scope="module", params=["llama", "gemma"])
def model(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(request.param, 100)).eval()


def decoded(model, traced: TracedPass, mode: str, num_rows: int, length: int) -> torch.Tensor:
    """The logits after two tokens behind prompts."""
    ids = torch.arange(num_rows * length).view(num_rows, length) * 7 % 100
    zeros = torch.zeros(num_rows, dtype=torch.long)
    prompts = PromptBatch(ids, torch.ones_like(ids), zeros, zeros, zeros)
    with torch.no_grad():
        decoding = Decoding(model, prompts, MODES[mode], 4, traced)
        for token in (3, 5):
            decoding.read(torch.full((num_rows,), token))
    return decoding.logits


def test_one_record_serves_all_sizes_to_the_last_bit(model):
    traced = TracedPass(model)
    for num_rows, length in ((4, 10), (1, 40), (6, 31)):
        found = decoded(model, traced, "traced", num_rows, length)
        assert torch.equal(found, decoded(model, traced, "matmul", num_rows, length))


def test_a_record_computes_with_the_weights_of_the_day_and_leaves_their_gradients(model):
    traced = TracedPass(model)
    before = decoded(model, traced, "traced", 2, 5)
    weight = model.model.layers[0].input_layernorm.weight  # of which Gemma computes 1 + weight
    assert weight.requires_grad
    for change in (lambda: weight.add_(0.5), lambda: setattr(weight, "data", weight.data + 0.5)):
        with torch.no_grad():
            change()
        after = decoded(model, traced, "traced", 2, 5)
        assert not torch.equal(after, before)
        assert torch.equal(after, decoded(model, traced, "matmul", 2, 5))
        before = after


def test_a_model_in_bf16_computed_in_fp32_is_the_model_with_its_weights_in_fp32(model):
    narrow = copy.deepcopy(model).bfloat16()
    wide = copy.deepcopy(narrow).float()
    traced = TracedPass(narrow, in_fp32=True)
    for change in (0, 0.5):
        with torch.no_grad():
            for one in (narrow, wide):
                one.model.layers[0].input_layernorm.weight.add_(change)
        found = decoded(narrow, traced, "traced in fp32", 2, 5)
        assert torch.equal(found, decoded(wide, TracedPass(wide), "traced", 2, 5))
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}


def test_rotary_positions_that_depend_on_a_row_s_length_are_not_recorded(model):
    assert can_be_traced(model.config)
    config = tiny_config("llama", 100)
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert not can_be_traced(config)
