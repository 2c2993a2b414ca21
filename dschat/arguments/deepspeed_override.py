"""The file behind --deepspeed_config_override: settings of DeepSpeed that no flag of ours decides."""

import difflib
import json
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

_PRECISION = "--dtype"
_ROWS = "--per_device_train_batch_size (step 3: --per_device_training_batch_size)"
OWNED = {
    "train_batch_size": _ROWS,
    "train_micro_batch_size_per_gpu": _ROWS,
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "managed_gradient_accumulation": "--gradient_accumulation_steps",
    "gradient_clipping": "--max_grad_norm",
    "optimizer": "--learning_rate, --weight_decay and --adam_beta1, --adam_beta2, --adam_epsilon",
    "scheduler": "--lr_scheduler_type and --num_warmup_steps",
    "bf16": _PRECISION,
    "bfloat16": _PRECISION,
    "ddp_bf16": _PRECISION,
    "fp16": _PRECISION,
    "torch_autocast": _PRECISION,
    "activation_checkpointing": "--gradient_checkpointing",
    "tensor_parallel": "--tensor_parallel_size",
    "sequence_parallel_size": "--sequence_parallel_size",
    "pipeline": "--pipeline_parallel_size",
    "hybrid_engine": "--enable_hybrid_engine and its flags",
    "compile": "--torch_compile",
    "checkpoint.load_universal": "--resume_from_checkpoint",
    "zero_optimization.stage": "--zero_stage (step 3: --actor_zero_stage and --critic_zero_stage)",
    "zero_optimization.cpu_offload": "--offload",
    "zero_optimization.cpu_offload_param": "--offload",
    "zero_optimization.offload_optimizer.device": "--offload",
    "zero_optimization.offload_optimizer.nvme_path": "--offload_nvme_path",
    "zero_optimization.offload_param.device": "--offload",
    "zero_optimization.offload_param.nvme_path": "--offload_nvme_path",
    "zero_optimization.zero_hpz_partition_size": "--zero_hpz_partition_size",
    "zero_optimization.zero_quantized_weights": "--zero_quantized_weights",
    "zero_optimization.zero_quantized_gradients": "--zero_quantized_gradients",
    "zero_optimization.zero_quantized_nontrainable_weights": "--enable_mixed_precision_lora",
}
"""What an override may not set, by its path in the configuration, and the flag that does."""

FREE = (
    *("aio", "autotuning", "checkpoint", "comet", "comms_logger", "communication_data_type", "csv_monitor"),
    *("data_efficiency", "data_types", "dataloader_drop_last", "datastates_ckpt", "disable_allgather"),
    *("disable_python_gc", "dump_state", "expert_parallel", "flops_profiler", "gradient_allreduce_op"),
    *("gradient_predivide_factor", "log_level", "memory_breakdown", "prescale_gradients"),
    *("seq_parallel_communication_data_type", "steps_per_print", "tensorboard", "timers"),
    *("use_data_before_expert_parallelism", "vocabulary_size", "wall_clock_breakdown", "wandb"),
    *("weight_quantization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    *("zero_optimization", "aio.block_size", "aio.intra_op_parallelism", "aio.overlap_events"),
    *("aio.queue_depth", "aio.single_submit", "aio.use_gds", "checkpoint.checkpoint_serialization"),
    *("checkpoint.parallel_write", "checkpoint.tag_validation", "checkpoint.use_node_local_storage"),
    "checkpoint.writer",
)
"""The keys of DeepSpeed 0.19.8 that no flag decides: the top level's, and those of `LISTED`."""

LISTED = ("aio", "checkpoint")
"""Objects in which DeepSpeed passes over a key that it does not know."""


def read_override(path: str) -> dict[str, Any]:
    """The content of an override file.

    Raises argparse's `ArgumentTypeError`, which the parser makes a `UserError` of, for a file that is no JSON
    object, and for a setting that DeepSpeed does not know or that a flag decides.
    """
    try:
        override = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentTypeError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(override, dict):
        raise ArgumentTypeError(
            f"{path} holds a {type(override).__name__}; give a JSON object of DeepSpeed's settings, such as "
            '{"wall_clock_breakdown": true}'
        )
    known, paths = [*FREE, *OWNED], _paths(override)
    inner = [name for name in paths if name.rpartition(".")[0] in LISTED]
    for name in [*override, *inner]:
        if name not in known or (name in override and "." in name):
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"use {close[0]!r}" if close else "remove it"
            raise ArgumentTypeError(f"{path}: DeepSpeed has no setting {name!r}; {remedy}")
    if not isinstance(override.get("zero_optimization", {}), dict):
        raise ArgumentTypeError(f"{path}: 'zero_optimization' must be an object; --zero_stage turns it on")
    for name in paths:
        if name in OWNED:
            raise ArgumentTypeError(
                f"{path} sets {name!r}, which {OWNED[name]} decides; remove the entry and use the flag"
            )
    return override


def _paths(settings: dict[str, Any], prefix: str = "") -> list[str]:
    """Every key, those of nested objects as "outer.inner"."""
    found = []
    for name, value in settings.items():
        found.append(prefix + name)
        if isinstance(value, dict):
            found += _paths(value, f"{prefix}{name}.")
    return found
