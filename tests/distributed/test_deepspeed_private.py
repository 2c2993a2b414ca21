"""The names of DeepSpeed that dschat depends on without a promise: whether this DeepSpeed still has them."""

import ast
import inspect
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import pytest
import torch
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
    "fp32_groups_gradients_flat", "__compatible_ops__",
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
