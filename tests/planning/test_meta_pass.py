"""What a pass holds and computes, told without weights."""

import pytest
import torch
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from dschat.planning.meta_pass import PassCost, Rows, Work, pass_cost, with_layers


def build(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def cost(family: str = "llama", *, way: str = "sdpa", trains: bool = True, rows: int = 2) -> PassCost:
    return pass_cost(
        build, tiny_config(family, 384), Rows(rows, 64, 64), dtype=torch.float32, way=way, trains=trains
    )


@pytest.mark.parametrize("family", ["llama", "opt", "falcon"])
def test_activations_and_work_are_in_proportion_to_rows(family):
    one, two = cost(family, rows=2), cost(family, rows=4)
    assert two.saved == pytest.approx(2 * one.saved, rel=0.05)
    assert two.flops == pytest.approx(2 * one.flops, rel=0.01)
    assert two.logits == 2 * one.logits == 2 * 2 * 2 * 64 * 384 * 4


def test_what_is_saved_is_what_autograd_saves():
    config = tiny_config("llama", 384)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).train()
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(2, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(input_ids=ids, use_cache=False).logits  # held: the storages keep their places
    assert cost(way="eager").saved == pytest.approx(sum(kept.values()) + 4 * logits.numel(), rel=0.05)


def test_training_computes_three_times_a_forward_pass_and_eager_attention_keeps_probabilities():
    assert cost().flops == pytest.approx(3 * cost(trains=False).flops, rel=0.05)
    assert cost(way="eager").saved > cost().saved
    assert cost(trains=False).peak < cost().peak


def test_a_layer_more_adds_what_the_second_added():
    config = tiny_config("llama", 384)
    whole = with_layers(config, 2)
    whole.num_hidden_layers, whole.layer_types = 4, None
    four = pass_cost(build, whole, Rows(2, 64, 64), dtype=torch.float32, trains=True)
    two = cost()
    assert four.saved - two.saved == pytest.approx(2 * (two.saved - one_layer().saved))
    assert four.flops - two.flops == pytest.approx(2 * (two.flops - one_layer().flops))


def one_layer() -> PassCost:
    config = with_layers(tiny_config("llama", 384), 1)
    return pass_cost(build, config, Rows(2, 64, 64), dtype=torch.float32, trains=True)


def test_an_operation_takes_the_longer_of_computing_and_moving():
    work = Work(((10.0, 2.0), (1.0, 20.0)))
    assert work.flops == 11
    assert work.seconds(flops_per_second=10, bytes_per_second=10, overhead=0.5) == 1 + 0.5 + 2 + 0.5
