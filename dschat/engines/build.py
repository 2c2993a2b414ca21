"""A model and its arguments in, a DeepSpeed engine out: a builder for trained models, one for frozen ones."""

import copy
import functools
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from dschat.arguments import ModelArguments, OptimizerArguments, RunArguments
from dschat.console import messages
from dschat.distributed import deepspeed_private
from dschat.distributed.mesh import mesh, stage
from dschat.engines.at_rest import rest
from dschat.engines.deepspeed_config import (
    get_eval_ds_config,
    get_train_ds_config,
    merged,
    tensor_parallel_size,
)
from dschat.engines.hybrid import Injection, building_hybrid, separate_phases
from dschat.engines.out_of_memory import consumes
from dschat.engines.pipeline import PipelinedEngine, pipeline_module
from dschat.engines.schedule import learning_rate_schedule
from dschat.engines.step import measure_gradient
from dschat.errors import UserError
from dschat.models.compiled_layers import compile_layers
from dschat.models.lora import add_lora, add_lora_to_stage, is_adapter
from dschat.models.products import use_chosen_products
from dschat.models.reward_model import enable_gradient_checkpointing
from dschat.models.tensor_parallel import shard_over_tensor_ranks


def parameter_groups(model: nn.Module, args: ModelArguments) -> list[dict]:
    """Trained parameters in groups: LoRA's adapters, which have a learning rate of their own, other weight
    matrices, and biases and norms, which do not decay.

    Under ZeRO-3, where a parameter is a flat shard, its whole shape says whether it is a vector.
    """
    adapters = [p for name, p in model.named_parameters() if p.requires_grad and is_adapter(name)]
    others = [p for name, p in model.named_parameters() if p.requires_grad and not is_adapter(name)]
    vectors = [p for p in others if len(deepspeed_private.whole_shape(p)) < 2]
    matrices = [p for p in others if len(deepspeed_private.whole_shape(p)) >= 2]
    groups = [
        {"params": adapters, "weight_decay": args.weight_decay, "lr": args.lora_learning_rate},
        {"params": matrices, "weight_decay": args.weight_decay, "lr": args.learning_rate},
        {"params": vectors, "weight_decay": 0.0, "lr": args.learning_rate},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module, model_args: ModelArguments, args: OptimizerArguments, *, offload: bool
) -> torch.optim.Optimizer:
    """AdamW: DeepSpeed's own on the CPU where states are offloaded, else torch's, fused."""
    groups = parameter_groups(model, model_args)
    settings: dict[str, Any] = {
        "lr": model_args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    if offload:
        optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, **settings)
        optimizer.register_step_pre_hook(_take_powers_of_betas)
        return optimizer
    return torch.optim.AdamW(groups, fused=get_accelerator().device_name() in ("cuda", "cpu"), **settings)


def _take_powers_of_betas(optimizer: Any, *_: Any) -> None:
    """Have DeepSpeed's Adam correct its moments' bias by powers of the betas in every step.

    It multiplies the powers up from step to step and takes them anew after a checkpoint only, which rounds
    otherwise: a resumed run would differ from one that was not stopped.
    """
    optimizer.ds_opt_adam.create_adam(optimizer.opt_id, 0, 0, 0, 0, 0, optimizer.adam_w_mode, False)


def train_config(
    model_args: ModelArguments, args: OptimizerArguments, run: RunArguments, *, per_device_batch_size: int
) -> dict:
    """The DeepSpeed configuration of a trained model; `create_hf_model` needs it before the engine.

    Raises `UserError` for settings that this number of ranks does not allow, or that DeepSpeed refuses.
    """
    ranks, size = mesh().world.size, run.zero_hpz_partition_size
    if ranks % size:
        raise UserError(f"--zero_hpz_partition_size {size} must divide the number of ranks, {ranks}.")
    # Without ZeRO, DeepSpeed 0.19 shards a pipeline's states in bf16 anyway, and cannot resume: its
    # runtime/engine.py, _load_checkpoint, looks for them in the files of weights.
    is_sharded = stage() is not None and run.dtype == "bf16"
    config = get_train_ds_config(
        stage=max(model_args.zero_stage, int(is_sharded)),
        dtype=run.dtype,
        offload=run.offload,
        nvme_path=run.offload_nvme_path,
        zeropp=run.zeropp,
        per_device_batch_size=per_device_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        tensor_parallel_size=model_args.tensor_parallel_size,
        max_grad_norm=args.max_grad_norm,
    )
    return _overridden(config, run)


def frozen_config(model_args: ModelArguments, run: RunArguments, *, offload: bool) -> dict:
    """The DeepSpeed configuration of a frozen model that stands beside the trained one of `model_args`."""
    config = get_eval_ds_config(
        stage=model_args.zero_stage,
        dtype=run.dtype,
        offload=offload,
        tensor_parallel_size=model_args.tensor_parallel_size,
    )
    return _overridden(config, run)


def _overridden(config: dict[str, Any], run: RunArguments) -> dict[str, Any]:
    """The configuration with --deepspeed_config_override's. Raises `UserError` if DeepSpeed refuses it."""
    if not run.deepspeed_config_override:
        return config
    config = merged(config, run.deepspeed_config_override)
    tried = copy.deepcopy(config)
    try:
        parsed = DeepSpeedConfig(tried)
        zero, factor = parsed.zero_config, parsed.gradient_predivide_factor
        assert factor > 0, f"gradient_predivide_factor must be positive, got {factor}"
        assert not (zero.stage and zero.reduce_scatter and (parsed.prescale_gradients or factor != 1)), (
            f"prescale_gradients and gradient_predivide_factor need reduce_scatter false at ZeRO {zero.stage}"
        )
    except Exception as error:  # its own, pydantic's, assertions and whatever a wrong type ends in
        raise UserError(f"--deepspeed_config_override: DeepSpeed refuses the settings: {error}") from error
    return config


@functools.cache
def note_long_warmup(args: OptimizerArguments, num_warmup_steps: int, num_training_steps: int) -> None:
    """Say once, for actor and critic together, that the learning rate rises for most of a short run."""
    if 2 * num_warmup_steps <= num_training_steps:
        return
    given = f"--num_warmup_steps {args.num_warmup_steps}"
    if args.warmup_ratio is not None:
        given = f"--warmup_ratio {args.warmup_ratio:g}"
    messages.note(
        f"warm-up takes {num_warmup_steps} of the run's {num_training_steps} optimiser steps "
        f"({given}), in which the learning rate still rises from 0 to its value; --warmup_ratio 0.1 takes a "
        "tenth."
    )


def build_trained_engine(
    model: Any,
    model_args: ModelArguments,
    args: OptimizerArguments,
    run: RunArguments,
    *,
    config: dict,
    num_training_steps: int,
    injection: Injection | None = None,
) -> DeepSpeedEngine:
    """An engine with optimiser and learning-rate schedule over `num_training_steps` optimiser steps.

    The model, of transformers or a `RewardModel`, gets LoRA adapters first where its arguments ask for them.
    With `injection` it is a Hybrid Engine.
    """
    if injection:
        alone = {"inference_tp_size": 1} if injection.obstacle else {}
        config = {**config, "hybrid_engine": injection.config | alone}
    if model_args.uses_lora:
        give_adapters = add_lora if stage() is None else add_lora_to_stage
        give_adapters(model, model_args, only_optimize_lora=args.only_optimize_lora)
    shard_layers(model, config)
    if model_args.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    use_chosen_products(model)
    if run.torch_compile:
        compile_layers(model, model.config)
    num_warmup_steps = args.warmup_steps(num_training_steps)
    note_long_warmup(args, num_warmup_steps, num_training_steps)
    optimizer = build_optimizer(model, model_args, args, offload=run.offload)
    scheduler = learning_rate_schedule(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=num_training_steps,
    )
    with building_hybrid(injection):
        engine = _initialize(model, config, optimizer=optimizer, lr_scheduler=scheduler)
    if injection:
        separate_phases(engine, injection)
    if config["zero_optimization"]["stage"] == 0:
        # In bf16 and fp16 DeepSpeed begins with a step of zero gradients, to allocate Adam's state: its step
        # count would be one ahead, and the first real update a quarter smaller than at the other stages.
        optimizer.state.clear()
        deepspeed_private.shorten_bf16_step(engine)
        for parameter in engine.module.parameters():
            if parameter.requires_grad and deepspeed_private.is_tensor_shard(parameter):
                parameter.register_post_accumulate_grad_hook(_mark_gradient_of_shard)
    engine.num_bad_losses, engine.skip_reason = 0, None
    # Whether too many steps are skipped is our decision, in any precision (--max_skipped_steps).
    deepspeed_private.train_on_at_lowest_scale(engine)
    consumes(model_args.prefix.removesuffix("_") or "model", engine)
    if engine.optimizer is optimizer:
        optimizer.register_step_pre_hook(deepspeed_private.drop_gradients_of_overflow)
    return _in_pipeline(engine, model)


def _mark_gradient_of_shard(parameter: Tensor) -> None:
    """Have DeepSpeed's norm of fp16 gradients count the shards of all tensor ranks.

    Its `get_weight_norm` is given gradients, and looks for a mark that parameters alone have.
    """
    parameter.grad.model_parallel = True  # type: ignore[union-attr]


def shard_layers(model: Any, config: dict[str, Any]) -> None:
    """Leave each tensor rank its share of the layers, in place, where the configuration asks for it."""
    if (size := tensor_parallel_size(config)) > 1:
        shard_over_tensor_ranks(model, size)


def _initialize(model: Any, config: dict[str, Any], **options: Any) -> DeepSpeedEngine:
    """DeepSpeed's engine. In a run with tensor ranks a model that they do not share is one of theirs too: it
    computes the same on each, and is averaged and sharded over the data ranks."""
    if stage() is not None:
        # Hidden states are sent whole, as their shapes change; tensor ranks are in the grid of the module.
        config = {**config, "pipeline": {"pipe_partitioned": False, "grad_partitioned": False}}
        config.pop("tensor_parallel", None)
        return deepspeed.initialize(model=pipeline_module(model), config=config, **options)[0]
    size = mesh().tensor.size
    shared = tensor_parallel_size(config) > 1
    if size > 1 and not shared:
        options["mpu"] = deepspeed_private.tensor_groups(size)
    engine, *_ = deepspeed.initialize(model=model, config=config, **options)
    if shared:
        deepspeed_private.trust_inputs(engine)
    return engine


def build_frozen_engine(
    model: Any, run: RunArguments, *, config: dict, role: str = "reference model", offload: bool = False
) -> DeepSpeedEngine:
    """An engine that is never trained: no gradients, eval mode. `role` is its name in messages.

    With `offload` its weights are in CPU memory outside of `at_rest.in_use`; at stage 3 `config` says so.
    """
    model.requires_grad_(False)
    shard_layers(model, config)
    use_chosen_products(model)
    if run.torch_compile:
        compile_layers(model, model.config)
    engine = _initialize(model, config)
    engine.eval()
    if offload and config["zero_optimization"]["stage"] < 3:
        rest(engine)
    consumes(role, engine)
    return _in_pipeline(engine, model)


def _in_pipeline(engine: DeepSpeedEngine, model: nn.Module) -> Any:
    """The engine, or where it runs a stage of a pipeline, what stands in its place for all callers."""
    if stage() is None:
        return engine
    if isinstance(engine.optimizer, torch.optim.AdamW):  # fp32 without ZeRO
        deepspeed_private.before_pipeline_step(engine, measure_gradient)
    return PipelinedEngine(engine, model)


def free_frozen_engine(engine: DeepSpeedEngine) -> None:
    """Give back the memory of a frozen engine's weights; it is of no use after that.

    DeepSpeed 0.19 keeps the module of a ZeRO-3 engine in a global list for good, so that dropping the engine
    would free nothing: its weights are emptied in place.
    """
    engine.destroy()
    engine.resting_weights = None
    deepspeed_private.empty_weights(engine.module)
    get_accelerator().empty_cache()
