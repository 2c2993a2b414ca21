import copy

import pytest
import torch
from tiny import save_tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from dschat.arguments import ModelArguments, OptimizerArguments, RunArguments
from dschat.engines.build import (
    build_optimizer,
    frozen_config,
    note_long_warmup,
    parameter_groups,
    train_config,
)
from dschat.engines.schedule import learning_rate_schedule
from dschat.errors import UserError
from dschat.models.loading import create_hf_model
from dschat.models.lora import add_lora

ARGS = ModelArguments(
    model_name_or_path="m", learning_rate=1e-5, weight_decay=0.1, lora_dim=4, lora_learning_rate=2e-4
)


@pytest.fixture
def model(tmp_path) -> nn.Module:
    folder = str(save_tiny_model(tmp_path, "opt"))
    return create_hf_model(AutoModelForCausalLM, folder, tiny_tokenizer())


def settings(groups: list[dict]) -> list[tuple[float, float]]:
    return [(group["lr"], group["weight_decay"]) for group in groups]


def test_matrices_decay_and_biases_and_norms_do_not(model):
    matrices, vectors = parameter_groups(model, ARGS)
    assert settings([matrices, vectors]) == [(1e-5, 0.1), (1e-5, 0.0)]
    assert {p.dim() for p in matrices["params"]} == {2}
    assert {p.dim() for p in vectors["params"]} == {1}


def test_adapters_have_a_learning_rate_of_their_own(model):
    add_lora(model, ARGS)
    groups = parameter_groups(model, ARGS)
    assert settings(groups) == [(2e-4, 0.1), (1e-5, 0.1), (1e-5, 0.0)]
    assert len(groups[0]["params"]) == 2 * 12  # A and B of six layers in each of two blocks
    assert all(4 in p.shape for p in groups[0]["params"])
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == sum(p.requires_grad for p in model.parameters())


def test_adapters_alone_are_one_group(model):
    add_lora(model, ARGS, only_optimize_lora=True)
    assert settings(parameter_groups(model, ARGS)) == [(2e-4, 0.1)]


def test_the_schedule_scales_every_group(model):
    add_lora(model, ARGS)
    optimizer = torch.optim.AdamW(parameter_groups(model, ARGS), lr=ARGS.learning_rate)
    scheduler = learning_rate_schedule("linear", optimizer, num_warmup_steps=0, num_training_steps=4)
    optimizer.step()
    scheduler.step()
    # Three of four steps remain.
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1.5e-4, 0.75e-5, 0.75e-5])


@pytest.mark.slow  # compiles DeepSpeed's Adam where nothing has before
def test_an_offloaded_adam_goes_on_after_a_checkpoint_to_the_last_bit():
    layers = [nn.Linear(64, 1, bias=False) for _ in range(2)]
    args, settings = ModelArguments(model_name_or_path="m", learning_rate=0.1), OptimizerArguments()
    whole, resumed = (build_optimizer(layer, args, settings, offload=True) for layer in layers)
    for step in range(1, 13):
        gradient = torch.randn(1, 64, generator=torch.Generator().manual_seed(step))
        layers[0].weight.grad = layers[1].weight.grad = gradient
        whole.step()
        if step == 5:
            resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
            layers[1].load_state_dict(layers[0].state_dict())
        elif step > 5:
            resumed.step()
            assert torch.equal(layers[1].weight, layers[0].weight), step


def test_the_fused_optimiser_is_adamw():
    """As torch's without fused or grouped operators, and as the formulas in double precision."""
    args = ModelArguments(model_name_or_path="m", learning_rate=0.01, weight_decay=0.1)
    layers = [nn.Linear(64, 8) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    ours = build_optimizer(layers[0], args, OptimizerArguments(), offload=False)
    assert ours.defaults["fused"]
    groups = parameter_groups(layers[1], args)
    plain = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=False, foreach=False)
    exact, mean, square = layers[0].weight.detach().double(), 0.0, 0.0
    for step in range(1, 13):
        generator = torch.Generator().manual_seed(step)
        for parameters in zip(*(layer.parameters() for layer in layers), strict=True):
            gradient = torch.randn(parameters[0].shape, generator=generator)
            for parameter in parameters:
                parameter.grad = gradient
        ours.step()
        plain.step()
        wide = layers[0].weight.grad.double()
        mean, square = 0.9 * mean + 0.1 * wide, 0.95 * square + 0.05 * wide**2
        exact = exact * (1 - 0.01 * 0.1)
        exact = exact - 0.01 * (mean / (1 - 0.9**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
    for one, other in zip(*(layer.parameters() for layer in layers), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layers[0].weight.double(), exact, rtol=1e-6, atol=1e-6)


def test_a_warm_up_of_most_of_the_run_is_said_once(capsys):
    default = OptimizerArguments(num_warmup_steps=100)
    for _ in ("actor", "critic"):
        note_long_warmup(default, default.warmup_steps(8), 8)
    said = capsys.readouterr().out
    assert said.count("note: warm-up takes 8 of the run's 8 optimiser steps (--num_warmup_steps 100)") == 1
    share = OptimizerArguments(warmup_ratio=0.6)
    note_long_warmup(share, share.warmup_steps(10), 10)
    assert "6 of the run's 10 optimiser steps (--warmup_ratio 0.6)" in capsys.readouterr().out
    note_long_warmup(default, default.warmup_steps(200), 200)
    assert capsys.readouterr().out == ""


def test_an_override_reaches_trained_and_frozen_engines():
    run = RunArguments(deepspeed_config_override={"wall_clock_breakdown": True})
    for config in (
        train_config(ARGS, OptimizerArguments(), run, per_device_batch_size=2),
        frozen_config(ARGS, run, offload=False),
    ):
        assert config["wall_clock_breakdown"]


def test_an_override_that_deepspeed_refuses_ends_the_run_before_a_model_is_loaded():
    run = RunArguments(deepspeed_config_override={"zero_optimization": {"reduce_bucket_size": -1}})
    with pytest.raises(
        UserError, match=r"--deepspeed_config_override: DeepSpeed refuses .*reduce_bucket_size"
    ):
        frozen_config(ARGS, run, offload=False)


@pytest.mark.parametrize(
    ("settings", "stage", "problem"),
    [
        ({"prescale_gradients": True}, 2, "prescale_gradients .* reduce_scatter false at ZeRO 2"),
        ({"gradient_predivide_factor": 2.0}, 3, "gradient_predivide_factor .* at ZeRO 3"),
        ({"gradient_predivide_factor": 0}, 0, "gradient_predivide_factor must be positive, got 0"),
    ],
)
def test_what_only_an_engine_refuses_is_refused_before_a_model_is_loaded(settings, stage, problem):
    args = ModelArguments(model_name_or_path="m", zero_stage=stage)
    run = RunArguments(deepspeed_config_override=settings)
    with pytest.raises(UserError, match=f"--deepspeed_config_override: DeepSpeed refuses .*{problem}"):
        train_config(args, OptimizerArguments(), run, per_device_batch_size=2)


def test_gradients_may_be_scaled_before_they_are_added_where_each_rank_has_them_whole():
    scaled = {"prescale_gradients": True, "zero_optimization": {"reduce_scatter": False}}
    run = RunArguments(deepspeed_config_override=scaled)
    args = ModelArguments(model_name_or_path="m", zero_stage=2)
    assert train_config(args, OptimizerArguments(), run, per_device_batch_size=2)["prescale_gradients"]


def test_ranks_that_share_a_second_copy_must_divide_all():
    args = ModelArguments(model_name_or_path="m", zero_stage=3)
    with pytest.raises(UserError, match="--zero_hpz_partition_size 2 must divide the number of ranks, 1"):
        train_config(
            args, OptimizerArguments(), RunArguments(zero_hpz_partition_size=2), per_device_batch_size=2
        )
