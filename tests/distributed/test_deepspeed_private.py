"""The names of DeepSpeed that dschat depends on without a promise: whether this DeepSpeed still has them."""

import ast
import inspect
import math
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed.runtime.fp16 import unfused_optimizer
from processes import ROOT
from torch import nn

from dschat.distributed import deepspeed_private
from dschat.distributed.deepspeed_private import SOURCES, VERSION, Source

PACKAGE = Path(deepspeed.__file__).parent


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: f"{s.function}-{s.file}:{s.line}")
def test_deepspeed_has_what_was_read_in_its_source(source: Source):
    needs = (
        f"dschat.distributed.deepspeed_private.{source.function} needs `{source.text}`, which stood in line "
        f"{source.line} of {source.file} in DeepSpeed {VERSION}; this is {deepspeed.__version__}"
    )
    path = PACKAGE / source.file
    assert path.exists(), f"{needs}, without that file: read anew how it does this, and change the function."
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [number for number, line in enumerate(lines, 1) if source.text in line]
    assert found, f"{needs}, without such a line: read anew how it does this, and change the function."
    if deepspeed.__version__ == VERSION:
        assert source.line in found, f"{needs}: there it stands in lines {found}; correct SOURCES."


def test_every_function_names_its_sources():
    named = {source.function for source in SOURCES}
    defined = {
        name
        for name, value in inspect.getmembers(deepspeed_private, inspect.isfunction)
        if value.__module__ == deepspeed_private.__name__ and not name.startswith("_")
    }
    assert defined - named == {"empty_weights", "drop_gradients_of_overflow"}  # by own_shard and set_overflow
    assert named <= defined


OWN = {
    "ds_id", "ds_shape", "ds_numel", "ds_tensor", "_global_grad_norm", "overflow", "overflow_checker",
    "loss_scaler", "loss_scale_config", "raise_error_at_min_scale", "_copy_recovery_script",
    "checkpoint_engine", "load_universal_checkpoint", "averaged_gradients", "grad_partitions_flat_buffer",
    "fp32_groups_gradients_flat", "__compatible_ops__", "_inference_containers",
}  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "dschat").rglob("*.py")), ids=lambda p: p.stem)
def test_no_other_file_names_them(path: Path):
    if path.name == "deepspeed_private.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "value", None)
        is_name = isinstance(node, ast.Attribute | ast.Constant) and isinstance(name, str)
        assert not (is_name and name in OWN), f"{path}:{node.lineno} names {name}: use deepspeed_private"
        of_engine = isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "engine"
        assert not (of_engine and name.startswith("_")), f"{path}:{node.lineno} names engine.{name}"


def sharded_parameter() -> nn.Parameter:
    """The second of two ranks' shards of a 3 x 5 matrix: 8 elements, the last of which is padding."""
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_id, parameter.ds_shape, parameter.ds_numel = 7, torch.Size([3, 5]), 15
    parameter.ds_tensor = torch.arange(8.0)
    return parameter


def test_a_sharded_parameter_tells_of_the_whole():
    parameter = sharded_parameter()
    assert deepspeed_private.is_sharded(parameter)
    assert deepspeed_private.whole_shape(parameter) == (3, 5)
    assert deepspeed_private.whole_size(parameter) == 15
    assert deepspeed_private.own_shard(parameter).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_any_other_parameter_is_the_whole():
    parameter = nn.Parameter(torch.zeros(2, 4))
    assert not deepspeed_private.is_sharded(parameter)
    assert deepspeed_private.whole_shape(parameter) == (2, 4)
    assert deepspeed_private.whole_size(parameter) == 8
    assert deepspeed_private.own_shard(parameter) is None


def test_weights_are_emptied_with_their_shards():
    module = nn.Linear(4, 4)
    module.bias.ds_tensor = torch.ones(2)
    deepspeed_private.empty_weights(module)
    assert [weight.numel() for weight in (module.weight, module.bias, module.bias.ds_tensor)] == [0, 0, 0]


def test_the_inner_optimiser_is_the_one_with_adams_state():
    adam = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    assert deepspeed_private.inner_optimizer(SimpleNamespace(optimizer=adam)) is adam
    wrapped = SimpleNamespace(optimizer=SimpleNamespace(optimizer=adam))
    assert deepspeed_private.inner_optimizer(wrapped) is adam


def test_the_checkpoint_writer_gets_the_configuration_and_no_scripts_are_copied():
    engine = SimpleNamespace(_config={"a": 1}, _copy_recovery_script=None, checkpoint_engine=None)
    writer = deepspeed_private.set_checkpoint_writer(engine, lambda config: ("writer", config))
    assert writer == engine.checkpoint_engine == ("writer", {"a": 1})
    assert engine._copy_recovery_script("folder") is None


def test_a_universal_checkpoint_is_asked_for_in_the_block_alone():
    engine = SimpleNamespace(_config=SimpleNamespace(load_universal_checkpoint=False))
    with deepspeed_private.loading_universal_checkpoint(engine):
        assert engine._config.load_universal_checkpoint
    assert not engine._config.load_universal_checkpoint


def test_a_loss_scaler_raises_nothing_at_its_lowest():
    engine = SimpleNamespace(
        optimizer=SimpleNamespace(loss_scaler=SimpleNamespace(raise_error_at_min_scale=True))
    )
    deepspeed_private.train_on_at_lowest_scale(engine)
    assert engine.optimizer.loss_scaler.raise_error_at_min_scale is False
    deepspeed_private.train_on_at_lowest_scale(SimpleNamespace(optimizer=SimpleNamespace()))  # bf16 has none


def bf16_optimizer(monkeypatch, *, shortened: bool, fused: bool) -> tuple[list[nn.Parameter], object]:
    """DeepSpeed's optimiser of three bf16 weights that clips at a norm of 1, as it is or with our step."""
    monkeypatch.setattr(unfused_optimizer.dist, "get_rank", lambda: 0)
    generator = torch.Generator().manual_seed(0)
    weights = [
        nn.Parameter(torch.randn(size, generator=generator).bfloat16()) for size in ((8, 4), (5,), (3,))
    ]
    groups = [{"params": weights[:1], "weight_decay": 0.1}, {"params": weights[1:], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1e-2, fused=fused)
    optimizer = unfused_optimizer.FP16_UnfusedOptimizer(
        adam, static_loss_scale=1.0, low_precision_dtype=torch.bfloat16, clip_grad=1.0
    )
    adam.state.clear()
    if shortened:
        deepspeed_private.shorten_bf16_step(SimpleNamespace(optimizer=optimizer))
    return weights, optimizer


def bf16_steps(weights: list[nn.Parameter], optimizer: object) -> list[tuple[float, bool]]:
    """Norm and overflow of steps whose gradient is clipped, not clipped, infinite, without one weight's."""
    seen = []
    for number, scale in enumerate((10.0, 0.01, math.inf, 0.1, 3.0)):
        generator = torch.Generator().manual_seed(number)
        for weight in weights:
            weight.grad = (torch.randn(weight.shape, generator=generator) * min(scale, 1e3)).bfloat16()
        if scale == math.inf:
            weights[1].grad[2] = -math.inf
        if scale == 0.1:
            weights[2].grad = None
        optimizer.step()
        optimizer.zero_grad()
        seen.append((optimizer._global_grad_norm, bool(optimizer.overflow)))
    return seen


@pytest.mark.parametrize("fused", [False, True])
def test_the_shortened_step_is_deepspeeds_to_rounding(monkeypatch, fused):
    weights, optimizer = bf16_optimizer(monkeypatch, shortened=False, fused=False)
    ours, shortened = bf16_optimizer(monkeypatch, shortened=True, fused=fused)
    start = [weight.detach().clone() for weight in weights]
    expected, actual = bf16_steps(weights, optimizer), bf16_steps(ours, shortened)
    assert [overflow for _, overflow in actual] == [False, False, True, False, False]
    assert [norm for norm, _ in actual] == pytest.approx([norm for norm, _ in expected], rel=1e-5)
    assert actual[0][0] > 1 > actual[1][0]
    for group, wanted in zip(shortened.fp32_groups, optimizer.fp32_groups, strict=True):
        torch.testing.assert_close(group, wanted, atol=1e-6, rtol=1e-6)
        for one, other in zip(group, wanted, strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(
                    shortened.state[one][name], optimizer.state[other][name], atol=1e-8, rtol=1e-5
                )
            assert shortened.state[one]["step"] == 4
    masters = [master for group in shortened.fp32_groups for master in group]
    for mine, master, before in zip(ours, masters, start, strict=True):
        assert torch.equal(mine, master.bfloat16())
        assert not torch.equal(mine, before)
    counts = [one.state_dict()["cur_iter"] for one in (shortened, optimizer)]
    assert counts[0] == counts[1] == 5


def test_no_other_optimiser_is_shortened(monkeypatch):
    _, optimizer = bf16_optimizer(monkeypatch, shortened=False, fused=True)
    optimizer.low_precision_dtype = torch.float16
    deepspeed_private.shorten_bf16_step(SimpleNamespace(optimizer=optimizer))
    assert "step" not in vars(optimizer)
