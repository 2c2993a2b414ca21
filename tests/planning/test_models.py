"""Numbers of weights, from models of one and two layers."""

import pytest
from plans import CONFIGS, arguments, specs_of
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from dschat.planning.models import PlannedModel, planned_models


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen3_moe"])
def test_weights_are_counted(family):
    config = tiny_config(family, 384)
    config.num_hidden_layers = 3
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * 3
    (spec,) = specs_of(arguments("sft"))
    counts = PlannedModel(spec, config, only_adapters=False).counts
    model = AutoModelForCausalLM.from_config(config)
    assert counts.whole == counts.trained == sum(p.numel() for p in model.parameters())
    assert counts.persistent == sum(p.numel() for p in model.parameters() if p.numel() <= 10_000)


def test_adapters_alone_are_trained():
    args = arguments("sft", "--lora_dim=2", "--only_optimize_lora")
    (model,) = planned_models(specs_of(args), only_adapters=True, configs=CONFIGS)
    # q and o of 32 x 32, k and v of 16 x 32, gate, up and down of 64 x 32, in two layers
    assert model.counts.trained == 2 * 2 * (2 * (32 + 32) + 2 * (16 + 32) + 3 * (64 + 32))
    assert model.trains_adapters_only


def test_equal_models_share_what_was_computed():
    args = arguments("sft")
    first, second = (planned_models(specs_of(args), only_adapters=False, configs=CONFIGS)[0] for _ in "ab")
    other = planned_models(specs_of(arguments("reward")), only_adapters=False, configs=CONFIGS)[0]
    assert first.structure == second.structure != other.structure


def test_a_reference_shares_the_actors_modules_and_is_not_trained():
    models = planned_models(specs_of(arguments("rlhf")), only_adapters=False, configs=CONFIGS)
    actor, reference = models[0], next(m for m in models if m.spec.role == "reference")
    assert actor.structure == reference.structure
    assert actor.counts.whole == actor.counts.trained == reference.counts.whole
    assert reference.counts.trained == 0
