"""Every model is born here: read from a folder or the hub, checked by key, sharded at once under ZeRO-3."""

import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config
from transformers.modeling_utils import load_state_dict
from transformers.utils import logging as transformers_logging

from dschat.console import messages
from dschat.distributed.mesh import is_main_process
from dschat.distributed.zero3 import gathered
from dschat.errors import UserError
from dschat.models.config import check_classifiable, check_generates, read_config
from dschat.models.model_folder import check_model_path
from dschat.models.quantization import four_bit_options, settle_4bit
from dschat.models.remote_code import loading_consent
from dschat.models.reward_model import RewardModel
from dschat.models.vocabulary import grow_vocabulary, settle_config

BACKBONE_NAMES = ("rwtransformer.", "rwtranrsformer.")
"""What DeepSpeed-Chat calls the backbone of a reward model; its releases of 2023 misspelt it."""


OUTPUT_LAYERS = ("lm_head.", "embed_out.")
"""Where causal language models keep the layer that a reward model has no use for."""


CONSTANTS = (
    *(".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias"),
    ".rotary_emb.inv_freq",
)
"""Causal masks and rotary frequencies, which older versions of transformers saved among the weights."""


HEAD = "score.weight"


def create_hf_model(
    model_class: type,
    model_name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    ds_config: dict[str, Any] | None = None,
    rlhf_training: bool = False,
    dropout: float | None = None,
    load_in_4bit: bool = False,
) -> PreTrainedModel:
    """A model of `model_class` (such as AutoModelForCausalLM) with its weights, in eval mode.

    `ds_config` decides the precision (fp32 without one) and, at ZeRO stage 3, that every rank holds its shard
    from the start. `dropout` replaces all the model's dropout probabilities; None leaves them. The vocabulary
    grows to the tokenizer's. `load_in_4bit` packs the linear layers. `rlhf_training` is accepted for old
    scripts: weights are always read, and never initialised first. Raises `UserError` when the weights cannot
    be read or do not match the model.
    """
    check_model_path(model_name_or_path, "model_name_or_path")
    config = read_config(model_name_or_path, dropout)
    if model_class is AutoModelForCausalLM:
        check_generates(config, model_name_or_path)
    load = _loader(model_class, model_name_or_path, config)
    _check_weights(load, model_name_or_path)
    with _construction(ds_config, _zero_stage(ds_config)):
        model = _load(load, _dtype(ds_config), load_in_4bit)
        grow_vocabulary(model, tokenizer)
    settle_config(model, tokenizer)
    return model


def create_critic_model(
    model_name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    ds_config: dict[str, Any] | None,
    num_padding_at_beginning: int = 0,
    rlhf_training: bool = False,
    dropout: float | None = None,
    zero_stage: int = 0,
    compute_fp32_loss: bool = False,
    load_in_4bit: bool = False,
) -> RewardModel:
    """A `RewardModel`: a base model with a fresh head, or with `rlhf_training` a saved reward model.

    The latter is what step 2 (or anyone) wrote for AutoModelForSequenceClassification with one label, or a
    DeepSpeed-Chat checkpoint. Either `zero_stage` or `ds_config` may ask for stage 3. A fresh head depends on
    torch's seed alone, not on rank or stage. `load_in_4bit` packs the backbone's linear layers.
    `num_padding_at_beginning` and `compute_fp32_loss` are accepted for old scripts: masks tell padding, and
    losses are always fp32. Raises as `create_hf_model` does.
    """
    check_model_path(model_name_or_path, "model_name_or_path")
    load = _reward_model_loader(model_name_or_path, dropout)
    _check_weights(load, model_name_or_path, fresh_head=not rlhf_training)
    stage = max(zero_stage, _zero_stage(ds_config))
    with _construction(ds_config, stage):
        classifier = _load(load, _dtype(ds_config), load_in_4bit, fresh_head=not rlhf_training)
        grow_vocabulary(classifier, tokenizer)
        if not rlhf_training:
            _draw_head(classifier.score)
    settle_config(classifier, tokenizer)
    model = RewardModel(classifier.base_model, classifier.score, classifier.config)
    model.new_tokens = classifier.new_tokens
    return model


def _reward_model_loader(model_name_or_path: str, dropout: float | None) -> Callable[..., Any]:
    """What reads a sequence classifier of one label from here. Raises `UserError` for other architectures."""
    config = read_config(model_name_or_path, dropout, num_labels=1, problem_type=None)
    check_classifiable(config, model_name_or_path)
    model_class = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    state = _deepspeed_chat_state(Path(model_name_or_path), model_class.base_model_prefix)
    return _loader(model_class, model_name_or_path, config, state)


def _loader(
    model_class: type, model_name_or_path: str, config: PretrainedConfig, state: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """`from_pretrained` bound to its weights: those of the folder or hub id, or `state` where it is given."""

    def load(**options: Any) -> Any:
        if state is None:
            return model_class.from_pretrained(
                model_name_or_path, config=config, **options, **loading_consent()
            )
        on_meta = options.get("device_map") == "meta"
        tensors = {name: tensor.to("meta") for name, tensor in state.items()} if on_meta else state
        return model_class.from_pretrained(None, config=config, state_dict=tensors, **options)

    return load


def _load(
    load: Callable[..., Any], dtype: torch.dtype, in_4bit: bool, *, fresh_head: bool = False
) -> PreTrainedModel:
    """The model with its weights, its linear layers packed where that is wanted.

    With `fresh_head` a head of another shape does not matter.
    """
    options = {"dtype": dtype, "ignore_mismatched_sizes": fresh_head}
    if not in_4bit:
        return load(**options)
    model = load(**options, **four_bit_options(dtype))
    settle_4bit(model)
    return model


def _check_weights(load: Callable[..., Any], model_name_or_path: str, fresh_head: bool | None = None) -> None:
    """Raise `UserError` that lists what is missing, unexpected or of another shape.

    Loads on the meta device, which takes no memory and works the same for every ZeRO stage (at stage 3 itself
    transformers does not report unexpected keys). With `fresh_head` the weights are those of a base model,
    whose output layer is left aside and whose head is still to be drawn.
    """
    try:
        with _quiet_transformers(progress=False):
            _, info = load(device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True)
    except (OSError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"the weights of {model_name_or_path!r} cannot be read: {error}") from error
    except Exception as error:  # whatever the family's code makes of values that it does not expect
        raise UserError(
            f"the model that config.json of {model_name_or_path!r} describes cannot be built "
            f"({type(error).__name__}: {' '.join(str(error).split())}); copy or download the file again."
        ) from error
    missing = set(info["missing_keys"])
    unexpected = {name for name in info["unexpected_keys"] if not name.endswith(CONSTANTS)}
    if fresh_head:
        if HEAD not in missing:
            messages.note(f"{model_name_or_path!r} has a reward head; a fresh one takes its place.")
        missing.discard(HEAD)
        unexpected = {name for name in unexpected if not name.startswith(OUTPUT_LAYERS)}
    mismatched = [keys for keys in info["mismatched_keys"] if not (fresh_head and keys[0] == HEAD)]
    shapes = {f"{key} {list(theirs)} not {list(ours)}" for key, theirs, ours in mismatched}
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    listed = [f"{kind}: {_shortened(keys)}" for kind, keys in problems.items() if keys]
    if listed:
        raise UserError(
            f"the weights of {model_name_or_path!r} do not fit its configuration; {'; '.join(listed)}. "
            f"{_remedy(missing, unexpected)}"
        )


def _remedy(missing: set[str], unexpected: set[str]) -> str:
    """What to do about weights that do not fit."""
    if any(name.startswith("v_head.") for name in unexpected):
        return "v_head is a value head, as TRL saves it beside a language model: give the model without it."
    if HEAD in unexpected:
        return "This is a reward model, not a language model."
    if HEAD in missing:
        return "A reward model comes from step 2, not from a base model."
    if missing and all(name.startswith(OUTPUT_LAYERS) for name in missing):
        return "It has no layer that makes words, as embedding models have none: give the language model."
    return "Check that config.json and the weights belong to the same model."


def _shortened(keys: set[str], limit: int = 20) -> str:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(sorted(keys)[:limit]) + more


def _deepspeed_chat_state(folder: Path, prefix: str) -> dict[str, torch.Tensor] | None:
    """The weights of a DeepSpeed-Chat reward model under transformers' names; None if the folder has none."""
    path = folder / "pytorch_model.bin"
    if not path.is_file() or (folder / "model.safetensors").is_file():
        return None
    try:
        state = load_state_dict(str(path), map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read as a file of weights alone: {error}") from error
    name = next((name for name in BACKBONE_NAMES if any(key.startswith(name) for key in state)), None)
    if name is None:
        return None
    renamed = {"v_head.weight": HEAD}
    return {
        f"{prefix}.{key.removeprefix(name)}" if key.startswith(name) else renamed.get(key, key): tensor
        for key, tensor in state.items()
    }


@contextmanager
def _construction(ds_config: dict[str, Any] | None, stage: int) -> Iterator[None]:
    """Models built inside are sharded as they come into being if `stage` is 3, those built later are not."""
    with _quiet_transformers(progress=is_main_process()):
        if stage < 3:
            yield
            return
        ds_config = ds_config or {}
        settings = {name: ds_config[name] for name in ("bf16", "fp16") if name in ds_config}
        settings["zero_optimization"] = {**ds_config.get("zero_optimization", {}), "stage": 3}
        # transformers keeps only a weak reference, so this name must live as long as the block.
        keep_alive = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, **settings})
        try:
            yield
        finally:
            unset_hf_deepspeed_config()
            del keep_alive


@contextmanager
def _quiet_transformers(progress: bool) -> Iterator[None]:
    """Hide reports of loading, which `_check_weights` turns into errors, and without `progress` the bars."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if not progress:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _draw_head(head: nn.Linear) -> None:
    """Normal(0, 1 / sqrt(d + 1)) as in Stiennon et al. 2020, https://arxiv.org/abs/2009.01325."""
    with gathered([head.weight], modifier_rank=0), torch.no_grad():
        generator = torch.Generator().manual_seed(torch.initial_seed())
        std = 1 / math.sqrt(head.in_features + 1)
        head.weight.copy_(torch.normal(0.0, std, (1, head.in_features), generator=generator))


def _dtype(ds_config: dict[str, Any] | None) -> torch.dtype:
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if ds_config and ds_config.get(name, {}).get("enabled"):
            return dtype
    return torch.float32


def _zero_stage(ds_config: dict[str, Any] | None) -> int:
    return (ds_config or {}).get("zero_optimization", {}).get("stage", 0)
