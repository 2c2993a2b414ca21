"""The names of DeepSpeed that dschat depends on without a promise: whether this DeepSpeed still has them."""

import ast
import inspect
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import deepspeed
import pytest
import torch
from deepspeed.runtime.fp16 import unfused_optimizer
from deepspeed.runtime.zero import partition_parameters
from processes import ROOT
from torch import nn

from dschat.distributed import deepspeed_private

VERSION = "0.19.8"
"""The DeepSpeed whose source was read."""


class Source(NamedTuple):
    """A line of DeepSpeed that a function of deepspeed_private.py depends on."""

    function: str
    file: str
    """Below the package's folder."""
    line: int
    text: str
    """What stands in that line, in part."""


_PARAMETERS = "runtime/zero/partition_parameters.py"
_AUTO_TP, _TP_LAYERS = "module_inject/auto_tp.py", "module_inject/layers.py"
SOURCES = (
    Source("is_sharded", _PARAMETERS, 1320, "param.ds_id = "),
    Source("whole_shape", _PARAMETERS, 1279, "param.ds_shape = param.shape"),
    Source("whole_size", _PARAMETERS, 1282, "param.ds_numel = param.numel()"),
    Source("own_shard", _PARAMETERS, 1846, "param.ds_tensor = partitioned_tensor"),
    Source("share_empty_weights", _PARAMETERS, 314, "def free_param(param: Parameter)"),
    Source("inner_optimizer", "runtime/zero/stage3.py", 232, "self.optimizer = init_optimizer"),
    Source("inner_optimizer", "runtime/zero/stage_1_and_2.py", 260, "self.optimizer = init_optimizer"),
    Source("inner_optimizer", "runtime/fp16/fused_optimizer.py", 77, "self.optimizer = init_optimizer"),
    Source("inner_optimizer", "runtime/fp16/unfused_optimizer.py", 64, "self.optimizer = init_optimizer"),
    Source("gradient_buffers", "runtime/zero/stage3.py", 513, "self.averaged_gradients = {}"),
    Source("gradient_buffers", "runtime/zero/stage3.py", 786, "self.grad_partitions_flat_buffer = None"),
    Source("gradient_buffers", "runtime/zero/stage_1_and_2.py", 687, "self.averaged_gradients = {}"),
    Source("gradient_buffers", "runtime/bf16_optimizer.py", 114, "self.fp32_groups_gradients_flat = []"),
    Source("set_gradient_norm", "runtime/engine.py", 1368, "return self._global_grad_norm"),
    Source("set_overflow", "runtime/engine.py", 3537, "overflow = self.optimizer.overflow"),
    Source("has_overflow", "runtime/fp16/fused_optimizer.py", 122, "self.overflow_checker = CheckOverflow("),
    Source("has_overflow", "runtime/fp16/unfused_optimizer.py", 205, "self.overflow_checker.check()"),
    Source("has_overflow", "runtime/utils.py", 272, "def check(self, param_groups=None):"),
    Source("has_overflow", "runtime/zero/stage3.py", 3009, "def has_overflow(self, "),
    Source("has_overflow", "runtime/zero/stage_1_and_2.py", 3237, "def has_overflow(self, "),
    Source("skipping", "runtime/fp16/fused_optimizer.py", 270, "self.overflow_checker.has_overflow("),
    Source("skipping", "runtime/fp16/fused_optimizer.py", 73, "self.loss_scale_config = loss_scale_config"),
    Source("skipping", "runtime/fp16/unfused_optimizer.py", 60, "self.loss_scale_config = loss_scale_config"),
    Source("skipping", "runtime/zero/stage3.py", 2991, "self.overflow = self.has_overflow("),
    Source("skipping", "runtime/zero/stage3.py", 524, "self.loss_scaler = CreateLossScaler("),
    Source("skipping", "runtime/zero/stage_1_and_2.py", 722, "self.loss_scaler = CreateLossScaler("),
    Source("train_on_at_lowest_scale", "runtime/fp16/loss_scaler.py", 236, "raise_error_at_min_scale = "),
    Source("before_pipeline_step", "runtime/pipe/engine.py", 1386, "self._INSTRUCTION_MAP[type(cmd)]"),
    Source("shorten_bf16_step", "runtime/fp16/unfused_optimizer.py", 197, "def step(self, closure=None):"),
    Source("shorten_bf16_step", "runtime/fp16/unfused_optimizer.py", 67, "self.fp16_groups = []"),
    Source("shorten_bf16_step", "runtime/fp16/unfused_optimizer.py", 68, "self.fp32_groups = []"),
    Source("shorten_bf16_step", "runtime/fp16/unfused_optimizer.py", 125, "def _skip_invalid_grad_norm("),
    Source("shorten_bf16_step", "runtime/fp16/unfused_optimizer.py", 277, "def _update_scale(self, skip):"),
    Source("set_checkpoint_writer", "runtime/engine.py", 545, "self._config = config_class"),
    Source("set_checkpoint_writer", "runtime/engine.py", 1902, "self.checkpoint_engine = "),
    Source("set_checkpoint_writer", "runtime/engine.py", 5567, "self._copy_recovery_script(save_path)"),
    Source("loading_universal_checkpoint", "runtime/engine.py", 1713, "load_universal_checkpoint"),
    Source("write_universal_checkpoint", "checkpoint/ds_to_universal.py", 1156, "def main(args):"),
    Source("write_universal_checkpoint", "checkpoint/ds_to_universal.py", 1169, "args.inject_missing_state"),
    Source("checkpoint_classes", "runtime/fp16/loss_scaler.py", 169, "class LossScaler("),
    Source("checkpoint_classes", "runtime/fp16/loss_scaler.py", 193, "class DynamicLossScaler("),
    Source("checkpoint_classes", "runtime/zero/config.py", 81, "class ZeroStageEnum("),
    Source("checkpoint_classes", "utils/tensor_fragment.py", 13, "class fragment_address"),
    Source("tensor_groups", "utils/groups.py", 202, "def _init_tp_mesh_device(tensor_model_parallel_size"),
    Source("shard_layers", _AUTO_TP, 212, "def __init__(self,"),
    Source("shard_layers", _AUTO_TP, 395, "def set_tensor_parallel_config(self, mp_size, mp_group)"),
    Source("shard_layers", _AUTO_TP, 408, 'if getattr(child, "replaced", False) == True:'),
    Source("shard_layers", _AUTO_TP, 931, "def register_replicated_grad_hooks(self, model)"),
    Source("shard_layers", _AUTO_TP, 962, "param._ds_grad_allreduce_registered = True"),
    Source("shard_layers", _AUTO_TP, 1001, "def update_linear_policies(self)"),
    Source("shard_layers", _AUTO_TP, 1038, "def _replace_module(self, r_module"),
    Source("shard_layers", _TP_LAYERS, 181, "def set_autotp_mode(training=False)"),
    Source("shard_layers", _TP_LAYERS, 689, "def collect_autotp_universal_checkpoint_info(model"),
    Source("shard_layers", "checkpoint/constants.py", 59, "UNIVERSAL_CHECKPOINT_INFO ="),
    Source("shard_layers", "runtime/engine.py", 1014, 'if getattr(model, "ds_autotp_parsed", False):'),
    Source("is_tensor_shard", _TP_LAYERS, 36, "DS_IS_REPLACED_MODULE = 'ds_is_replaced_module'"),
    Source("whole_over_tensor_ranks", _TP_LAYERS, 906, "def gather_params(self, params_list)"),
    Source("whole_over_tensor_ranks", _TP_LAYERS, 1016, "def gather_params(self, params_list)"),
    Source("trust_inputs", "runtime/engine.py", 1005, "self.first_dataloader_check = "),
    Source("forget_secondary_group", "utils/groups.py", 938, "_ZERO_PARAM_INTRA_PARALLEL_GROUP is None"),
    Source("no_start_of_forward", "runtime/zero/parameter_offload.py", 308, "self.fwd_pre_hook = "),
    Source("injected_layers", "runtime/hybrid_engine.py", 44, "self._inference_containers = []"),
    Source("import_muon", "runtime/zero/muon/original_muon.py", 50, "@compiler.compile()"),
    Source("compile_no_shared_memory_collectives", "comm/torch.py", 49, "deepspeed.ops.__compatible_ops__"),
    Source("compile_no_shared_memory_collectives", "ops/op_builder/cpu/comm.py", 49, "deepspeed_shm_comm"),
)


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


def test_released_weights_share_one_empty_tensor(monkeypatch):
    monkeypatch.setattr(partition_parameters, "free_param", partition_parameters.free_param)
    deepspeed_private.share_empty_weights()
    weights = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    for weight in weights:
        weight.ds_active_sub_modules = set()
        partition_parameters.free_param(weight)
        assert weight.numel() == 0
        assert weight.ds_status is partition_parameters.ZeroParamStatus.NOT_AVAILABLE
    assert weights[0].untyped_storage()._cdata == weights[1].untyped_storage()._cdata
    weights[0].data = torch.ones(4)
    assert weights[1].numel() == 0


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


def test_the_optimizers_of_deepspeed_import_no_compiler():
    script = """
import sys
import torch
from deepspeed.runtime import compiler
from dschat.distributed.deepspeed_private import import_muon
import_muon()
muon = "deepspeed.runtime.zero.muon.original_muon"
print(muon in sys.modules, "torch._inductor.compile_fx" in sys.modules, compiler.compile() is torch.compile)
"""
    told = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert told.splitlines()[-1] == "True False True"
