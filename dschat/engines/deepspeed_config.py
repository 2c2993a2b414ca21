"""DeepSpeed configurations as plain dictionaries: pure functions of numbers, the world size among them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

Dtype = Literal["bf16", "fp16", "fp32"]


def _precision(dtype: Dtype) -> dict[str, Any]:
    if dtype == "bf16":
        return {"bf16": {"enabled": True}}
    if dtype == "fp16":
        return {"fp16": {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 100}}
    return {}


def get_train_ds_config(
    *,
    stage: int,
    dtype: Dtype = "bf16",
    offload: bool = False,
    nvme_path: str | None = None,
    zeropp: Mapping[str, bool | int] = MappingProxyType({}),
    per_device_batch_size: int = 1,
    gradient_accumulation_steps: int = 1,
    tensor_parallel_size: int = 1,
    max_grad_norm: float = 1.0,
) -> dict[str, Any]:
    """Configuration of a trained engine.

    stage: what ZeRO shards (0 nothing, 1 optimiser states, 2 gradients too, 3 weights too). offload moves the
    optimiser states, and at stage 3 the weights, to CPU memory, or at stage 3 into files below nvme_path.
    zeropp: ZeRO++'s settings, for stage 3. Batch sizes are in rows; DeepSpeed multiplies them by the ranks,
    which it counts itself.
    """
    place: dict[str, Any] = {"device": "cpu" if offload else "none"}
    if offload and nvme_path and stage == 3:
        place = {"device": "nvme", "nvme_path": nvme_path}
    zero: dict[str, Any] = {"stage": stage}
    if stage > 0:
        zero["offload_optimizer"] = place
        zero["overlap_comm"] = True
    if stage == 3:
        zero["offload_param"] = dict(place)
        zero |= zeropp
        # Small parameters (norms, biases) stay whole: gathering each costs more than holding it.
        zero["stage3_param_persistence_threshold"] = 10_000
    return {
        "train_micro_batch_size_per_gpu": per_device_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "steps_per_print": 2**31,
        "zero_optimization": zero,
        "gradient_clipping": max_grad_norm,
        **_precision(dtype),
        **_tensor_parallel(tensor_parallel_size),
    }


def get_eval_ds_config(
    *,
    stage: int,
    dtype: Dtype = "bf16",
    offload: bool = False,
    per_device_batch_size: int = 1,
    tensor_parallel_size: int = 1,
) -> dict[str, Any]:
    """Configuration of a frozen engine: only stage 3 shards its weights, any other stage means none."""
    zero: dict[str, Any] = {"stage": 0}
    if stage == 3:
        zero = {
            "stage": 3,
            "offload_param": {"device": "cpu" if offload else "none"},
            "stage3_param_persistence_threshold": 10_000,
        }
    return {
        "train_micro_batch_size_per_gpu": per_device_batch_size,
        "steps_per_print": 2**31,
        "zero_optimization": zero,
        **_precision(dtype),
        **_tensor_parallel(tensor_parallel_size),
    }


def tensor_parallel_size(config: dict[str, Any]) -> int:
    """Ranks that share the weights of each layer."""
    size: int = config.get("tensor_parallel", {}).get("autotp_size", 1)
    return size


def _tensor_parallel(size: int) -> dict[str, Any]:
    return {"tensor_parallel": {"autotp_size": size}} if size > 1 else {}


def merged(config: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """`config` with the entries of `override` in place of its own, nested objects entry by entry."""
    both = {
        name: merged(config[name], value)
        for name, value in override.items()
        if isinstance(value, dict) and isinstance(config.get(name), dict)
    }
    return config | override | both
