"""LoRA through PEFT: a frozen weight W acts as W + alpha / r * B A, https://arxiv.org/abs/2106.09685.

PEFT is imported where adapters are made or written and not before: that takes seconds.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dschat.arguments import ModelArguments
from dschat.console import messages
from dschat.distributed.deepspeed_private import whole_shape
from dschat.errors import UserError
from dschat.models.lora_file import read_lora_file
from dschat.models.preflight import meta_model
from dschat.models.quantization import check_bitsandbytes, num_weights
from dschat.models.reward_model import RewardModel
from dschat.models.token_rows import PEFT_ROWS, ROWS, merge_rows, merged_rows, new_rows_of, train_new_rows

if TYPE_CHECKING:
    from peft import LoraConfig

LORA_A, LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"
"""How PEFT names an adapter's weights, A [r, in] and B [out, r], after the layer they belong to."""


SHOWN_TOKENS = 8
"""New tokens named in a message."""


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's, or what is added to the rows of new tokens."""
    return name.endswith((LORA_A, LORA_B, ROWS))


def check_adapters(*, language: ModelArguments | None = None, reward: ModelArguments | None = None) -> None:
    """Raise `UserError` for adapters that a language or reward model cannot get. Reads no weights.

    That is a file that asks for what is not supported, names that are in no linear layer's, and 4 bits
    without bitsandbytes or in a model that keeps its weights transposed.
    """
    for args, is_reward_model in ((language, False), (reward, True)):
        if args is None or not args.uses_lora:
            continue
        if args.load_in_4bit:
            check_bitsandbytes(f"--{args.prefix}load_in_4bit")
        model = meta_model(args.model_name_or_path, is_reward_model=is_reward_model)
        layers = _covered_layers(model, args, _wanted(args))
        if args.load_in_4bit and any(isinstance(layer, Conv1D) for layer in layers.values()):
            raise UserError(
                f"--{args.prefix}load_in_4bit is not for a {model.config.model_type!r} model: its layers "
                "keep their weights transposed; leave the flag out."
            )


def add_lora(
    model: PreTrainedModel | RewardModel, args: ModelArguments, *, only_optimize_lora: bool = False
) -> None:
    """Give the backbone's linear layers adapters, in place; the model's outputs stay what they were.

    The weights of these layers are frozen. All else is trained, or with `only_optimize_lora` nothing but a
    reward model's head, the biases that a `lora_config` file names, and the rows of tokens that are new to
    the model, which could not be learned otherwise. A is drawn from torch's seed alone,
    the same on every rank and at every ZeRO stage; B is 0. Raises `UserError` as `check_adapters` does.
    """
    from peft import inject_adapter_in_model

    wanted = _wanted(args)
    layers = _covered_layers(model, args, wanted)
    host = model.rwtransformer if isinstance(model, RewardModel) else model
    config = dataclasses.replace(
        wanted,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
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
    new_tokens = getattr(model, "new_tokens", {})
    if only_optimize_lora and new_tokens:
        config = dataclasses.replace(config, trainable_token_indices=train_new_rows(host, new_tokens))
    model.lora_config = config  # type: ignore[assignment]  # modules declare tensors and modules alone
    _announce(model, len(layers))


def add_lora_to_stage(
    model: PreTrainedModel | RewardModel, args: ModelArguments, *, only_optimize_lora: bool = False
) -> None:
    """Give a stage of a pipeline the adapters that `add_lora` gives its layers in the whole model.

    A whole model whose weights take no memory gets them first: A is drawn layer by layer.
    """
    from peft import inject_adapter_in_model

    is_reward_model = isinstance(model, RewardModel)
    whole = meta_model(args.model_name_or_path, is_reward_model=is_reward_model)
    for module in whole.modules():
        for name, parameter in module.named_parameters(recurse=False):
            weight = torch.zeros((), dtype=next(model.parameters()).dtype).expand(parameter.shape)
            setattr(module, name, nn.Parameter(weight))
    add_lora(whole, args, only_optimize_lora=only_optimize_lora)
    config = lora_config(whole)
    assert config is not None
    assert config.target_modules is not None
    host = model.rwtransformer if isinstance(model, RewardModel) else model
    own = {name for name, module in host.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    inject_adapter_in_model(
        dataclasses.replace(config, target_modules=sorted(own.intersection(config.target_modules))), host
    )
    drawn = dict(whole.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(drawn[name].requires_grad)
        if is_adapter(name):
            parameter.data.copy_(drawn[name].data)
    model.lora_config = config  # type: ignore[assignment]  # modules declare tensors and modules alone


def lora_config(model: nn.Module) -> "LoraConfig | None":
    """PEFT's configuration of the model's adapters; None where there are none."""
    return getattr(model, "lora_config", None)


def trains_adapters_only(model: nn.Module) -> bool:
    """Whether the model without its adapters stays what it was when it was loaded."""
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    return lora_config(model) is not None and all(map(is_adapter, trained))


def will_train_adapters_only(args: ModelArguments, *, only_optimize_lora: bool) -> bool:
    """What `trains_adapters_only` will say of a language model once it has these adapters."""
    return args.uses_lora and only_optimize_lora and _wanted(args).bias == "none"


def trains_more_than_adapters(model: nn.Module) -> bool:
    """Whether weights are trained that `save_adapter` does not write: embeddings, norms, other biases."""
    config = lora_config(model)
    assert config is not None, "the model has no adapters"
    return any(
        p.requires_grad and name != "v_head.weight" and not _is_written(name, config)
        for name, p in model.named_parameters()
    )


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was loaded inside the block, and what it was before after it; no gradient flag changes.

    The adapters still run, times 0: under ZeRO-3 every pass then meets the same layers in the same order, and
    DeepSpeed goes on fetching weights ahead. Adding 0 changes no finite number.
    """
    from peft.helpers import rescale_adapter_scale

    rows = new_rows_of(model)
    with rescale_adapter_scale(model, 0):
        for part in rows:
            part.scale = 0.0
        try:
            yield
        finally:
            for part in rows:
                part.scale = 1.0


@contextlib.contextmanager
def adapters_fused(model: nn.Module) -> Iterator[None]:
    """The adapters added into the weights inside the block, for passes that are to take less time.

    A second copy of their layers' weights is held meanwhile; afterwards each is bit by bit what it was. Under
    ZeRO-3 the weights must be gathered. Layers in 4 bits keep their adapters.
    """
    if lora_config(model) is None:
        yield
        return
    from peft.tuners.lora import Linear

    layers = [module for module in model.modules() if isinstance(module, Linear)]
    weights = [layer.get_base_layer().weight for layer in layers]
    before = [weight.data for weight in weights]
    try:
        for layer in layers:
            layer.merge(safe_merge=True)  # into a copy
        yield
    finally:
        for layer, weight, data in zip(layers, weights, before, strict=True):
            weight.data = data
            layer.merged_adapters.clear()


def merge_lora(state: dict[str, Tensor], config: "LoraConfig") -> dict[str, Tensor]:
    """The weights of the same model without adapters, W + alpha / r * B A in their place; `state` stays.

    With rsLoRA the factor is alpha / sqrt(r). Added in fp32 and rounded once, to W's precision. The rows of
    new tokens take their places too.
    """
    state = merge_rows(state, _ids_by_layer(config))
    factor = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    merged = {name.replace(".base_layer.", "."): t for name, t in state.items() if not is_adapter(name)}
    for layer in (name.removesuffix(LORA_A) for name in state if name.endswith(LORA_A)):
        a, b, weight = state[layer + LORA_A], state[layer + LORA_B], merged[f"{layer}.weight"]
        update = factor * (b.float() @ a.float())
        update = update.T if config.fan_in_fan_out else update
        merged[f"{layer}.weight"] = (weight.float() + update).to(weight.dtype)
    return merged


def save_adapter(state: dict[str, Tensor], config: "LoraConfig", folder: Path) -> None:
    """Write the adapters as `PeftModel.from_pretrained` reads them, and what PEFT counts to them: biases that
    the configuration names, a reward model's head.

    `state` has the names of the model that is loaded under the adapter. What else was trained is not in it.
    """
    heads = ["score"] if config.task_type == "SEQ_CLS" else None
    kept = {name for name in state if _is_written(name, config) or (heads and name == "score.weight")}
    rows = merged_rows(state, _ids_by_layer(config))
    folder.mkdir()
    whole = {name.replace(".default.", "."): state[name] for name in sorted(kept) if not name.endswith(ROWS)}
    whole |= {layer + PEFT_ROWS: tensor for layer, tensor in rows.items()}
    tensors = {f"base_model.model.{name}": tensor for name, tensor in whole.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    dataclasses.replace(config, modules_to_save=heads, inference_mode=True).save_pretrained(str(folder))


def _ids_by_layer(config: "LoraConfig") -> dict[str, list[int]]:
    """The tokens whose rows are trained, by the name of the layer."""
    ids = config.trainable_token_indices or {}
    assert isinstance(ids, dict)  # `train_new_rows` makes it so
    return ids


def _is_written(name: str, config: "LoraConfig") -> bool:
    """Whether a parameter belongs into the adapter's file: A, B, and the biases that PEFT counts to them."""
    bias = {"none": "", "all": ".bias", "lora_only": ".base_layer.bias"}[config.bias]
    return is_adapter(name) or (bool(bias) and name.endswith(bias))


def adapted_layers(
    model: PreTrainedModel | RewardModel, args: ModelArguments
) -> tuple[dict[str, nn.Module], int]:
    """The layers that get adapters, by name, and the adapters' rank. Raises `UserError`.

    Without `--lora_config` PEFT, whose import takes half a second, is not asked.
    """
    wanted = None if args.lora_config is None else _wanted(args)
    return _covered_layers(model, args, wanted), args.lora_dim if wanted is None else wanted.r


def _wanted(args: ModelArguments) -> "LoraConfig":
    """PEFT's configuration by the flags or by the file; its target modules are not resolved yet."""
    from peft import LoraConfig

    if args.lora_config is not None:
        return read_lora_file(args)
    alpha = args.lora_dim if args.lora_alpha is None else args.lora_alpha
    return LoraConfig(
        r=args.lora_dim,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides it by r, so that any number will do
        lora_dropout=args.lora_dropout,
        target_modules="all-linear",
    )


def _covered_layers(
    model: PreTrainedModel | RewardModel, args: ModelArguments, wanted: "LoraConfig | None"
) -> dict[str, nn.Module]:
    """The backbone's linear layers that get adapters: all, those of `lora_module_name`, those of the file."""
    backbone = model.rwtransformer if isinstance(model, RewardModel) else model.base_model
    inside = set(backbone.modules())  # leaves out the layer that turns hidden states into logits
    layers: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if module in inside and isinstance(module, nn.Linear | Conv1D)
    }
    if args.lora_config is not None and wanted is not None:
        own_name = functools.partial(_name_in_transformers, model)
        return _layers_of_file(layers, args, wanted, own_name)
    parts = [part.strip() for part in args.lora_module_name.split(",") if part.strip()]
    for part in parts:
        if not any(part in name for name in layers):
            raise UserError(
                f"--{args.prefix}lora_module_name {part!r} is in no name of a linear layer of this model; "
                f"{_kinds(layers)} Without the flag all get adapters."
            )
    return {name: m for name, m in layers.items() if not parts or any(part in name for part in parts)}


def _name_in_transformers(model: PreTrainedModel | RewardModel, name: str) -> str:
    """The layer's name in the model class that transformers loads, which is what PEFT's files are about."""
    if isinstance(model, RewardModel):
        return f"{model.rwtransformer.base_model_prefix}.{name.removeprefix('rwtransformer.')}"
    return name


def _layers_of_file(
    layers: dict[str, nn.Module], args: ModelArguments, wanted: "LoraConfig", own_name: Callable[[str], str]
) -> dict[str, nn.Module]:
    """The layers that PEFT would choose. Raises `UserError` for a name or pattern that fits none."""
    from peft.tuners.tuners_utils import check_target_module_exists

    names = {own_name(name): name for name in layers}
    where = f"--{args.prefix}lora_config {args.lora_config}: "
    targets, excluded = wanted.target_modules, wanted.exclude_modules
    given: list[str] = sorted(targets) if isinstance(targets, set) else []
    for target in given:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise UserError(f"{where}target_modules: {target!r} is no linear layer here; {_kinds(names)}")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        wanted = dataclasses.replace(wanted, target_modules=".*", exclude_modules=excluded)
    try:
        chosen = [names[name] for name in names if check_target_module_exists(wanted, name)]
    except re.error as error:
        raise UserError(
            f"{where}target_modules or exclude_modules is no regular expression: {error}."
        ) from error
    if not chosen:
        raise UserError(
            f"{where}its target_modules and exclude_modules leave no linear layer; {_kinds(names)}"
        )
    return {name: layers[name] for name in chosen}


def _kinds(names: Iterable[str]) -> str:
    kinds = sorted({re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names})
    return f"the names are {', '.join(kinds)} (* is a number)."


def _announce(model: Any, num_layers: int) -> None:
    """Report how many layers have adapters, and what else is trained or not."""
    sizes = [(num_weights(p), p.requires_grad) for p in model.parameters()]
    trained, total = sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)
    messages.info(f"LoRA on {num_layers} layers: {trained:,} of {total:,} weights are trained")
    config = lora_config(model)
    if config is not None and config.trainable_token_indices:
        shown = [repr(token) for token in model.new_tokens.values()]
        more = f" and {len(shown) - SHOWN_TOKENS} more" if len(shown) > SHOWN_TOKENS else ""
        messages.info(
            f"the vocabulary's rows of {', '.join(shown[:SHOWN_TOKENS])}{more} are trained too: "
            "these tokens are new to the model."
        )
    stacked = [p for p in model.parameters() if len(whole_shape(p)) == 3]
    if stacked:
        treatment = "trained whole" if stacked[0].requires_grad else "not trained"
        messages.note(f"the experts' weights are no linear layers and get no adapters; they are {treatment}.")
