import copy

import pytest
import torch
from tiny import tiny_config
from transformers import AutoModelForCausalLM, GPTNeoConfig

from dschat.rlhf.rollout.decode_modes import MODES, agreeing_modes, distinct_rows

ON_A_CPU_IN_FP32 = [name for name, mode in MODES.items() if not mode.in_fp32 and not mode.is_graphed]


def test_distinct_rows_are_numbered_in_the_order_of_their_first():
    first, place = distinct_rows(torch.tensor([[5, 1], [3, 2], [5, 1], [0, 0], [3, 2]]))
    assert (first.tolist(), place.tolist()) == ([0, 1, 3], [0, 1, 0, 2, 1])


def test_rows_that_are_all_distinct_keep_their_order():
    first, place = distinct_rows(torch.tensor([[5, 1], [3, 2]]))
    assert first.tolist() == place.tolist() == [0, 1]


def test_what_is_hidden_and_shown_is_what_attention_takes():
    prompts = torch.tensor([[0, 1]])
    assert MODES["model"].mask(prompts, 3).tolist() == [[0, 1, 0]]
    assert MODES["sdpa"].mask(prompts, 3).tolist() == [[[[False, True, False]]]]
    added = MODES["matmul"].mask(prompts, 3)
    assert added[0, 0, 0, 1] == MODES["matmul"].shown == 0
    assert (added[0, 0, 0, [0, 2]] < -1e38).all()


def modes(model, longest: int = 64) -> list[str]:
    with torch.no_grad():
        return agreeing_modes(model, num_tokens=90, longest=longest)


@pytest.fixture(scope="module")
def mistral():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config("mistral", 100)).eval()


def test_a_model_whose_window_is_shorter_than_rows_makes_its_own_masks(mistral):
    assert modes(mistral, longest=256) == ON_A_CPU_IN_FP32
    assert modes(mistral, longest=257) == ["model"]


def test_layers_without_keys_and_values_have_no_mode(mistral, monkeypatch):
    monkeypatch.setattr(mistral.config, "layer_types", ["linear_attention", "full_attention"], raising=False)
    assert modes(mistral) == []


@pytest.mark.parametrize("kind", ["global", "local"])
def test_layers_whose_window_ends_with_the_last_column_have_no_mode(kind):
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 64, "vocab_size": 100}
    config = GPTNeoConfig(**shape, attention_types=[[["global", kind], 1]], eos_token_id=0)
    assert bool(modes(AutoModelForCausalLM.from_config(config).eval())) == (kind == "global")


def test_a_mode_that_computes_something_else_is_left_out(mistral, monkeypatch):
    monkeypatch.setattr(type(MODES["matmul"]), "mask", lambda *_: torch.zeros(2, 1, 1, 64))
    assert not {"matmul", "traced"} & set(modes(mistral))


def test_a_model_in_bf16_on_a_cpu_can_be_computed_in_fp32(mistral):
    assert next(iter(modes(copy.deepcopy(mistral).bfloat16()))) == "traced in fp32"


def test_passes_with_hooks_in_python_are_not_traced(mistral):
    with torch.no_grad():
        found = agreeing_modes(mistral, num_tokens=90, longest=64, with_python_hooks=True)
    assert found == [name for name in ON_A_CPU_IN_FP32 if not MODES[name].is_traced]
