"""Linear layers in fp32 for weights in bf16: the same layer, more exactly, in names and files what it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from dschat.distributed.process_wide import process_wide
from dschat.models import products
from dschat.models.products import Products, choose_products, linear_in_fp32, use_chosen_products
from dschat.runs.measured_choices import MeasuredChoices


@pytest.fixture
def in_fp32(monkeypatch):
    monkeypatch.setattr(process_wide(Products), "way", "fp32")


def test_output_and_gradients_are_those_of_the_layer_in_double_precision_rounded():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5, 16), torch.randn(8, 16), torch.randn(8)
    inputs = [tensor.bfloat16().requires_grad_() for tensor in (x, weight, bias)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    gradient = torch.randn(2, 5, 8).bfloat16()
    output, expected = linear_in_fp32(*inputs), F.linear(*exact)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected.bfloat16())
    actual = torch.autograd.grad(output, inputs, gradient)
    for ours, theirs in zip(actual, torch.autograd.grad(expected, exact, gradient.double()), strict=True):
        torch.testing.assert_close(ours, theirs.bfloat16())


def test_a_layer_with_a_transposed_weight_is_the_same():
    torch.manual_seed(0)
    layer = Conv1D(8, 16).bfloat16()
    x, gradient = torch.randn(3, 16).bfloat16(), torch.randn(3, 8).bfloat16()
    output = linear_in_fp32(x, layer.weight, layer.bias, transposed=True)
    expected = F.linear(x.double(), layer.weight.double().t(), layer.bias.double())
    torch.testing.assert_close(output, expected.bfloat16())
    actual = torch.autograd.grad(output, list(layer.parameters()), gradient)
    by_name = dict(zip((name for name, _ in layer.named_parameters()), actual, strict=True))
    torch.testing.assert_close(by_name["weight"], (x.double().t() @ gradient.double()).bfloat16())
    torch.testing.assert_close(by_name["bias"], gradient.double().sum(0).bfloat16())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_model_says_the_same_and_keeps_its_names_and_copies(family, in_fp32):
    config = tiny_config(family, 60, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.arange(20).view(2, 10) + 5
    expected, names = model(ids).logits, [(n, type(m)) for n, m in model.named_modules()]
    use_chosen_products(model)
    assert [(n, type(m)) for n, m in model.named_modules()] == names
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0.1)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
    copied = copy.deepcopy(model)
    nn.init.zeros_(model.get_input_embeddings().weight)
    for layer in model.modules():
        if type(layer) in (nn.Linear, Conv1D):
            nn.init.zeros_(layer.weight)
    torch.testing.assert_close(copied(ids).logits, expected, rtol=0, atol=0.1)


def test_layers_in_fp32_are_left_to_torch(in_fp32):
    layer = nn.Sequential(nn.Linear(4, 4))
    x = torch.randn(2, 4)
    expected = layer(x)
    use_chosen_products(layer)
    assert torch.equal(layer(x), expected)


def test_only_a_run_in_bf16_is_timed_and_only_its_choice_changes_layers(monkeypatch, tmp_path):
    monkeypatch.setattr(process_wide(Products), "way", "bf16")
    layer = nn.Sequential(nn.Linear(4, 4))
    choices = MeasuredChoices(folder=tmp_path, measures=False)
    choose_products("fp32", choices)
    assert choices.made == {}
    choose_products("bf16", choices)
    assert list(choices.made.values()) == ["bf16"]
    use_chosen_products(layer)
    assert "forward" not in vars(layer[0])
    choose_products("bf16", MeasuredChoices(dict.fromkeys(choices.made, "fp32"), folder=tmp_path))
    use_chosen_products(layer)
    assert vars(layer[0])["forward"].func is products._forward


@pytest.mark.parametrize("transposed", [False, True])
def test_memory_that_is_used_again_changes_no_number(transposed):
    """Layers of different sizes, whose passes lie between each other's as those of a model do."""
    torch.manual_seed(0)
    sizes = [(7, 16, 8), (7, 8, 24), (3, 24, 5)]
    cases = []
    for rows, width, outputs in sizes:
        weight = torch.randn(width, outputs) if transposed else torch.randn(outputs, width)
        inputs = (torch.randn(rows, width), weight, torch.randn(outputs))
        cases.append([tensor.bfloat16().requires_grad_() for tensor in inputs])
    with torch.no_grad():  # by tensors of their own
        alone = [linear_in_fp32(*inputs, transposed=transposed) for inputs in cases]
    outputs = [linear_in_fp32(*inputs, transposed=transposed) for inputs in cases]
    for inputs, output, expected in reversed(list(zip(cases, outputs, alone, strict=True))):
        assert torch.equal(output, expected)
        gradient = torch.randn_like(output)
        actual = torch.autograd.grad(output, inputs, gradient)
        x, weight, _ = (tensor.detach().float() for tensor in inputs)
        wide = gradient.float()
        by_hand = (
            wide @ (weight.t() if transposed else weight),
            x.t() @ wide if transposed else wide.t() @ x,
        )
        torch.testing.assert_close(actual[0], by_hand[0].bfloat16())
        torch.testing.assert_close(actual[1], by_hand[1].bfloat16())
        torch.testing.assert_close(actual[2], wide.sum(0).bfloat16())
    assert set(process_wide(products._Scratch).memory) == {"weight", "inputs", "outputs"}
