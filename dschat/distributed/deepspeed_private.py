"""Every private or undocumented name of DeepSpeed that dschat depends on, each in a small function.

tests/distributed/test_deepspeed_private.py says where each name was read, and tells which of them another
version of DeepSpeed has moved. DeepSpeed is imported inside functions: a module that only asks about
parameters starts faster without it.
"""

import contextlib
import functools
import importlib
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn

from dschat.distributed.collectives import norm_across_tensor_ranks

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine


def is_sharded(parameter: Tensor) -> bool:
    """Whether ZeRO-3 shards this parameter over the ranks."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: Tensor) -> torch.Size:
    """A parameter's shape, under ZeRO-3 that of all shards together."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def whole_size(parameter: Tensor) -> int:
    """A parameter's number of elements, under ZeRO-3 those of all shards."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def own_shard(parameter: Tensor) -> Tensor | None:
    """This rank's shard of a parameter under ZeRO-3, with padding in the last rank's; None elsewhere."""
    return getattr(parameter, "ds_tensor", None)


def inner_optimizer(engine: "DeepSpeedEngine") -> Any:
    """The optimiser that holds Adam's state: inside DeepSpeed's, or the engine's own."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def gradient_buffers(engine: "DeepSpeedEngine") -> list[Any]:
    """Where DeepSpeed's optimisers keep gradients beside the parameters': nested lists and dictionaries."""
    names = ("averaged_gradients", "grad_partitions_flat_buffer", "fp32_groups_gradients_flat")
    return [getattr(engine.optimizer, name, None) for name in names]


def set_gradient_norm(engine: "DeepSpeedEngine", norm: Tensor | float) -> None:
    """Have `engine.get_global_grad_norm()` return this norm until the next optimiser step."""
    engine._global_grad_norm = norm


def set_overflow(engine: "DeepSpeedEngine", overflow: Tensor | bool) -> None:
    """Tell an engine whose optimiser is torch's whether its coming step is one to be skipped."""
    engine.optimizer.overflow = overflow


def drop_gradients_of_overflow(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Before a step that `set_overflow` skips: without gradients AdamW leaves weights and moments alone."""
    if optimizer.overflow:  # type: ignore[attr-defined]
        optimizer.zero_grad(set_to_none=True)


def _overflow_checker(engine: "DeepSpeedEngine") -> Any:
    """What DeepSpeed's optimiser asks for overflow: itself, or without ZeRO an object that it holds."""
    return getattr(engine.optimizer, "overflow_checker", engine.optimizer)


def has_overflow(engine: "DeepSpeedEngine") -> bool:
    """Whether gradients of an fp16 engine are infinite or NaN on any rank. Every rank must call it."""
    checker = _overflow_checker(engine)
    return bool(checker.check() if hasattr(checker, "check") else checker.has_overflow())


@contextlib.contextmanager
def skipping(engine: "DeepSpeedEngine") -> Iterator[None]:
    """Inside the block, an fp16 engine skips its optimiser step and keeps its loss scale."""
    optimizer, checker = engine.optimizer, _overflow_checker(engine)
    scaler = optimizer.loss_scaler if hasattr(optimizer, "loss_scaler") else optimizer.loss_scale_config
    scale = dict(vars(scaler))
    checker.has_overflow = lambda *args, **kwargs: True
    try:
        yield
    finally:
        del checker.has_overflow
        vars(scaler).update(scale)


def before_pipeline_step(engine: Any, action: Callable[[Any], None]) -> None:
    """Call `action(engine)` before each optimiser step of a PipelineEngine, once gradients are reduced."""
    from deepspeed.runtime.pipe.schedule import OptimizerStep

    take_step = engine._INSTRUCTION_MAP[OptimizerStep]

    def act_and_step(engine: Any, **options: Any) -> None:
        action(engine)
        take_step(engine, **options)

    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, OptimizerStep: act_and_step}


def train_on_at_lowest_scale(engine: "DeepSpeedEngine") -> None:
    """Have an fp16 engine skip steps for ever where DeepSpeed would raise at the lowest loss scale."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False


def shorten_bf16_step(engine: "DeepSpeedEngine") -> None:
    """Have a bf16 engine without ZeRO take the same optimiser step with a third of the passes over gradients.

    DeepSpeed looks for infinities in every tensor, each with a synchronisation of its own on a GPU, casts for
    the norm, casts for the step, and multiplies by 1 where nothing is clipped. The norm alone tells of
    infinities; it is taken while the cast gradient is in the cache. State and checkpoints are as before.
    """
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    optimizer = engine.optimizer
    if not isinstance(optimizer, FP16_UnfusedOptimizer) or optimizer.low_precision_dtype != torch.bfloat16:
        return

    def step(closure: None = None) -> bool:
        weights = [p for group in optimizer.fp16_groups for p in group]
        masters = [p for group in optimizer.fp32_groups for p in group]
        whole: list[Tensor] = []
        shards: list[Tensor] = []
        for weight, master in zip(weights, masters, strict=True):
            master.grad = torch.zeros_like(master) if weight.grad is None else weight.grad.float()
            norm = torch.linalg.vector_norm(master.grad)
            (shards if is_tensor_shard(weight) else whole).append(norm)
        norm = norm_across_tensor_ranks(whole, shards).item()
        if not math.isfinite(norm):
            return bool(optimizer._skip_invalid_grad_norm())
        optimizer.overflow, optimizer._global_grad_norm = False, norm
        optimizer._update_scale(False)
        if 0 < optimizer.clip_grad < norm:
            nn.utils.clip_grads_with_norm_(masters, optimizer.clip_grad, torch.tensor(norm))
        optimizer.optimizer.step()
        for weight, master in zip(weights, masters, strict=True):
            master.grad = None
            weight.data.copy_(master.data)
        return False

    optimizer.step = step


def set_checkpoint_writer(engine: "DeepSpeedEngine", writer: Callable[[Any], Any]) -> Any:
    """Have a writer, made of the engine's configuration, write its checkpoints; return it.

    DeepSpeed's scripts, which load pickles and whose copying may raise, are left out.
    """
    engine.checkpoint_engine = writer(engine._config)
    engine._copy_recovery_script = lambda _: None
    return engine.checkpoint_engine


@contextlib.contextmanager
def loading_universal_checkpoint(engine: "DeepSpeedEngine") -> Iterator[None]:
    """Inside the block, `engine.load_checkpoint` reads a universal checkpoint."""
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False


def write_universal_checkpoint(folder: Path, output: Path) -> None:
    """Make of a ZeRO checkpoint a universal one, a file per parameter, in this process."""
    from deepspeed.checkpoint import ds_to_universal

    settings = SimpleNamespace(input_folder=str(folder), output_folder=str(output), keep_temp_folder=False)
    settings.num_extract_workers = settings.num_merge_workers = 1  # other processes would load pickles
    settings.strict = False  # of adapters' frozen weights a checkpoint has shapes alone
    settings.inject_missing_state = True
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        ds_to_universal.main(settings)


def checkpoint_classes() -> list[Any]:
    """The classes in DeepSpeed's checkpoints besides tensors and plain values: they hold numbers."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def forget_secondary_group() -> None:
    """Have ZeRO++'s group of ranks for a second copy of weights made again, which one model alone may do."""
    from deepspeed.utils import groups

    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


@contextlib.contextmanager
def no_start_of_forward(engine: "DeepSpeedEngine") -> Iterator[None]:
    """Inside the block ZeRO-3 does not compare the order of layers over the ranks when a pass begins."""
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    hook = engine.module._forward_pre_hooks[offload.fwd_pre_hook.id]
    offload.fwd_pre_hook.remove()
    try:
        yield
    finally:
        offload.fwd_pre_hook = engine.module.register_forward_pre_hook(hook)


def injected_layers(engine: "DeepSpeedEngine") -> int:
    """Layers of a Hybrid Engine that have kernels of DeepSpeed for generation; 0 for other engines."""
    return len(getattr(engine, "_inference_containers", []))


def compile_no_shared_memory_collectives() -> None:
    """Keep DeepSpeed from compiling collectives that only tensor-parallel inference calls.

    Their buffers, 66 MiB a rank, stay in /dev/shm for ever, and where that is full the process dies.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def share_empty_weights() -> None:
    """Have all weights that ZeRO-3 releases share one empty tensor.

    DeepSpeed makes another for each weight and release. These small blocks stand in glibc's heap among what
    passes allocate, and split what is free once that goes.
    """
    from deepspeed.runtime.zero import partition_parameters

    release, empty = partition_parameters.free_param, functools.cache(torch.empty)

    def free_param(parameter: Tensor) -> None:
        release(parameter)
        parameter.data = empty(0, dtype=parameter.dtype, device=parameter.device)

    partition_parameters.free_param = free_param


def import_muon() -> None:
    """Import DeepSpeed's Muon, which its optimizers look for and no run of ours uses, as plain functions.

    To compile them it would import torch's compiler: a second, and 43 MB.
    """
    from deepspeed.runtime import compiler

    with mock.patch.object(compiler, "compile", return_value=lambda function: function):
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


def empty_weights(module: nn.Module) -> None:
    """Free the memory of a module's weights, shards included; the module is of no use after that."""
    for parameter in module.parameters():
        for weight in (parameter, own_shard(parameter)):
            if weight is not None:
                weight.data = torch.empty(0, dtype=weight.dtype, device=weight.device)


def tensor_groups(size: int) -> Any:
    """DeepSpeed's groups of tensor and data ranks, made once: the `mpu` of engines in a run that has them."""
    from deepspeed.utils import groups

    groups._init_tp_mesh_device(tensor_model_parallel_size=size)
    return groups


def shard_layers(
    model: nn.Module, patterns: dict[str, str], adapted: dict[str, nn.Module], *, size: int
) -> None:
    """Replace the layers whose weights' names match a pattern by AutoTP's, in place.

    The kinds are "column", "gathered column", "row" and "summed": a whole weight of which each rank has a
    part of the gradient. `adapted` are layers by name inside which PEFT has put others; AutoTP would replace
    them as one. Parameters of ZeRO-3 become plain ones, which the engine shards over the data ranks.
    """
    from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO
    from deepspeed.module_inject.auto_tp import AutoTP
    from deepspeed.module_inject.autotp_config import AutoTPConfig, PartitionType, TPLayerSpec
    from deepspeed.module_inject.layers import collect_autotp_universal_checkpoint_info, set_autotp_mode

    set_autotp_mode(training=True)
    types = {"row": PartitionType.ROW, "summed": PartitionType.SKIP}
    specs = [
        TPLayerSpec(
            patterns=[pattern],
            partition_type=types.get(kind, PartitionType.COLUMN),
            gather_output=kind == "gathered column",
            grad_allreduce=kind == "summed",
        )
        for pattern, kind in patterns.items()
    ]
    autotp = AutoTP(
        module=model,
        all_reduce_linears=(),
        prefix="",
        state_dict=None,
        linear_layer_setting=(nn.Linear, nn.Embedding),
        orig_layer_impl=None,
        partition_config=AutoTPConfig(tp_size=size, layer_specs=specs),
        model_config=model.config,
        training_mode=True,
    )
    autotp.set_tensor_parallel_config(size, tensor_groups(size).get_tensor_model_parallel_group())
    autotp.update_linear_policies()
    for name, layer in adapted.items():
        autotp._replace_module(layer, name)
        layer.replaced = True  # type: ignore[assignment]  # modules declare tensors and modules alone
    autotp._replace_module(model)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter._ds_grad_allreduce_registered = True  # type: ignore[attr-defined]  # no hook for it
    with contextlib.redirect_stdout(io.StringIO()):  # it says how many
        autotp.register_replicated_grad_hooks(model)
    setattr(model, UNIVERSAL_CHECKPOINT_INFO, collect_autotp_universal_checkpoint_info(model))
    model.ds_autotp_parsed = True  # type: ignore[assignment]  # the engine finds nothing left to do


def is_tensor_shard(parameter: Tensor) -> bool:
    """Whether the ranks of a tensor group hold parts of this parameter, under ZeRO-3 or not."""
    return getattr(parameter, "ds_is_replaced_module", False)


def whole_over_tensor_ranks(parameter: Tensor, shard: Tensor) -> Tensor:
    """The whole of which each rank of a tensor group has a `shard` of the parameter's shape, on its device.

    Every rank must call it. What is no shard is whole already.
    """
    if not is_tensor_shard(parameter):
        return shard
    whole = shard.detach()
    parameter.gather_params([whole])  # type: ignore[attr-defined]
    return whole


def trust_inputs(engine: "DeepSpeedEngine") -> None:
    """Have an engine of AutoTP take its first inputs as all later ones: it would pickle and compare them."""
    engine.first_dataloader_check.remove()
