"""LoRA through PEFT: a frozen weight W acts as W + alpha / r * B A, https://arxiv.org/abs/2106.09685.

PEFT is imported where adapters are made or written and not before: that takes seconds.
"""

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dschat.arguments import ModelArguments
from dschat.distributed import print_once
from dschat.errors import UserError
from dschat.models.reward_model import RewardModel

if TYPE_CHECKING:
    from peft import LoraConfig

LORA_A, LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"
"""How PEFT names an adapter's weights, A [r, in] and B [out, r], after the layer they belong to."""


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return name.endswith((LORA_A, LORA_B))


def add_lora(
    model: PreTrainedModel | RewardModel, args: ModelArguments, *, only_optimize_lora: bool = False
) -> None:
    """Give the backbone's linear layers adapters, in place; the model's outputs stay what they were.

    The weights of these layers are frozen. All else is trained, or with `only_optimize_lora` nothing but a
    reward model's head. A is drawn from torch's seed alone, the same on every rank and at every ZeRO stage;
    B is 0. Raises `UserError` where a part of `lora_module_name` is in no linear layer's name.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = _covered_layers(model, args)
    host = model.rwtransformer if isinstance(model, RewardModel) else model
    config = LoraConfig(
        r=args.lora_dim,
        lora_alpha=args.lora_dim if args.lora_alpha is None else args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=[name.removeprefix("rwtransformer.") for name in layers],
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
        task_type="SEQ_CLS" if isinstance(model, RewardModel) else "CAUSAL_LM",
        base_model_name_or_path=args.model_name_or_path,
    )
    assert all(isinstance(layer, Conv1D) == config.fan_in_fan_out for layer in layers.values())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(torch.initial_seed())
        inject_adapter_in_model(config, host)
    for name, parameter in model.named_parameters():
        if not only_optimize_lora and not name.endswith(".base_layer.weight"):
            parameter.requires_grad_(True)
    model.lora_config = config
    _announce(model, len(layers))


def lora_config(model: nn.Module) -> "LoraConfig | None":
    """The configuration of the model's adapters, None where it has none."""
    return getattr(model, "lora_config", None)


def trains_more_than_adapters(model: nn.Module) -> bool:
    """Whether weights are trained that `save_adapter` does not write: embeddings, norms, biases."""
    written = ("v_head.weight", LORA_A, LORA_B)
    return any(p.requires_grad and not name.endswith(written) for name, p in model.named_parameters())


def merge_lora(state: dict[str, Tensor], config: "LoraConfig") -> dict[str, Tensor]:
    """The weights of the same model without adapters, W + alpha / r * B A in their place; `state` stays.

    Added in fp32 and rounded once, to W's precision.
    """
    merged = {name.replace(".base_layer.", "."): t for name, t in state.items() if not is_adapter(name)}
    for layer in (name.removesuffix(LORA_A) for name in state if name.endswith(LORA_A)):
        a, b, weight = state[layer + LORA_A], state[layer + LORA_B], merged[f"{layer}.weight"]
        update = config.lora_alpha / config.r * (b.float() @ a.float())
        update = update.T if config.fan_in_fan_out else update
        merged[f"{layer}.weight"] = (weight.float() + update).to(weight.dtype)
    return merged


def save_adapter(state: dict[str, Tensor], config: "LoraConfig", folder: Path) -> None:
    """Write the adapters, and a reward model's head with them, as `PeftModel.from_pretrained` reads them.

    `state` has the names of the model that is loaded under the adapter. What else was trained is not in it.
    """
    heads = ["score"] if config.task_type == "SEQ_CLS" else None
    kept = {name for name in state if is_adapter(name) or (heads and name == "score.weight")}
    folder.mkdir()
    tensors = {f"base_model.model.{name.replace('.default.', '.')}": state[name] for name in sorted(kept)}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    dataclasses.replace(config, modules_to_save=heads, inference_mode=True).save_pretrained(folder)


def _covered_layers(model: PreTrainedModel | RewardModel, args: ModelArguments) -> dict[str, nn.Module]:
    """The backbone's linear layers whose names hold a part of `lora_module_name`; all where it is empty."""
    backbone = model.rwtransformer if isinstance(model, RewardModel) else model.base_model
    inside = set(backbone.modules())  # leaves out the layer that turns hidden states into logits
    layers = {
        name: module
        for name, module in model.named_modules()
        if module in inside and isinstance(module, nn.Linear | Conv1D)
    }
    parts = [part.strip() for part in args.lora_module_name.split(",") if part.strip()]
    for part in parts:
        if not any(part in name for name in layers):
            kinds = sorted({re.sub(r"\d+", "*", name) for name in layers})
            raise UserError(
                f"--{args.prefix}lora_module_name {part!r} is in no name of a linear layer of this model; "
                f"the names are {', '.join(kinds)} (* is a number). Without the flag all get adapters."
            )
    return {name: m for name, m in layers.items() if not parts or any(part in name for part in parts)}


def _announce(model: nn.Module, num_layers: int) -> None:
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    trained, total = sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)
    print_once(f"LoRA on {num_layers} layers: {trained:,} of {total:,} weights are trained")
    stacked = [p for p in model.parameters() if len(getattr(p, "ds_shape", p.shape)) == 3]
    if stacked:
        fate = "trained whole" if stacked[0].requires_grad else "not trained"
        print_once(f"note: the experts' weights are no linear layers and get no adapters; they are {fate}.")
