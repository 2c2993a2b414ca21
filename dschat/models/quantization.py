"""QLoRA: frozen weights in 4 bits (NF4) under adapters that are trained, https://arxiv.org/abs/2305.14314.

The packing is bitsandbytes', an optional extra, which is imported where such weights are unpacked.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from dschat.distributed.deepspeed_private import whole_size
from dschat.distributed.device import current_device
from dschat.errors import UserError


def check_bitsandbytes(flag: str) -> None:
    """Raise `UserError` naming `flag` where bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"{flag} needs bitsandbytes, which is not installed: pip install 'dschat[qlora]', or leave "
            "the flag out."
        )


def four_bit_options(dtype: torch.dtype) -> dict[str, Any]:
    """Options of `from_pretrained` that hold linear layers in 4 bits on this rank's device.

    They compute in `dtype`. Output layers and heads stay whole.
    """
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": settings, "device_map": {"": current_device()}}


def forget_4bit(model: Any) -> None:
    """Remove every trace of 4 bits but the weights, so that engines and exports see an ordinary model."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On some CPUs an evaluation would repack the weights for a kernel that has no gradient.
            module.support_avx512bf16_for_cpu = False
    for config in (model.config, model.base_model.config):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    model.hf_quantizer = None
    model.base_model.is_loaded_in_4bit = True  # PEFT asks the model it is given, a reward model's backbone


def is_4bit(parameter: Tensor) -> bool:
    """Whether a parameter is packed, two weights a byte."""
    return getattr(parameter, "quant_state", None) is not None


def is_packed(model: nn.Module) -> bool:
    """Whether the model, or an engine's, has packed weights."""
    return any(is_4bit(parameter) for parameter in model.parameters())


def num_weights(parameter: Any) -> int:
    """Weights in a parameter, also where it is packed or sharded."""
    if is_4bit(parameter):
        return parameter.quant_state.shape.numel()
    return whole_size(parameter)


def unpacked(parameter: Any) -> Tensor:
    """The weights of a packed parameter in the precision the model was loaded in; any other as it is."""
    if not is_4bit(parameter):
        return parameter
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, parameter.quant_state)
