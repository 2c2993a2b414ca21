"""Model loading: every model is made here, read from a folder or the hub and sharded at once under ZeRO-3."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from dschat.distributed.deepspeed_private import forget_secondary_group
from dschat.distributed.device import current_device, device_type
from dschat.distributed.mesh import Axis, is_main_process, mesh
from dschat.models.attention import set_attention
from dschat.models.config import check_generates, read_config
from dschat.models.model_folder import check_model_path
from dschat.models.quantization import forget_4bit, four_bit_options
from dschat.models.reward_model import RewardModel, draw_head
from dschat.models.stage import finish_stage
from dschat.models.tensor_parallel import await_turn_to_load
from dschat.models.vocabulary import configure_tokens, grow_vocabulary
from dschat.models.weights import check_weights, quiet_transformers, reward_model_loader, weights_loader


def create_hf_model(
    model_class: type,
    model_name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    ds_config: dict[str, Any] | None = None,
    rlhf_training: bool = False,
    dropout: float | None = None,
    load_in_4bit: bool = False,
    attn_implementation: str | None = None,
    stage: Axis | None = None,
) -> PreTrainedModel:
    """A model of `model_class` (such as AutoModelForCausalLM) with its weights, in evaluation mode.

    `ds_config` decides the precision (fp32 without one) and, at ZeRO stage 3, that every rank holds its shard
    from the start. `dropout` replaces all the model's dropout probabilities; None leaves them. The vocabulary
    grows to the tokenizer's. `load_in_4bit` packs the linear layers. `attn_implementation` is the flag's
    value, None for what transformers chooses. `stage` is that of a pipeline, whose layers alone are read
    (`dschat.models.stage`). `rlhf_training` is accepted for old scripts: weights are always
    read, and never initialised first. Raises `UserError` when the weights cannot be read or do not match the
    model.
    """
    check_model_path(model_name_or_path, "model_name_or_path")
    config = read_config(model_name_or_path, dropout)
    if model_class is AutoModelForCausalLM:
        check_generates(config, model_name_or_path)
    set_attention(config, attn_implementation)
    load = weights_loader(model_class, model_name_or_path, config)
    check_weights(load, model_name_or_path)
    with _construction(ds_config, _zero_stage(ds_config)):
        model = _load(load, {**_options(ds_config), "stage": stage}, load_in_4bit)
        grow_vocabulary(model, tokenizer)
    configure_tokens(model, tokenizer)
    finish_stage(model, stage)
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
    attn_implementation: str | None = None,
    stage: Axis | None = None,
) -> RewardModel:
    """A `RewardModel`: a base model with a fresh head, or with `rlhf_training` a saved reward model.

    The latter is what step 2 (or anyone) wrote for AutoModelForSequenceClassification with one label, or a
    DeepSpeed-Chat checkpoint. Either `zero_stage` or `ds_config` may ask for stage 3. A fresh head depends on
    torch's seed alone, not on rank or stage. `load_in_4bit` packs the backbone's linear layers.
    `num_padding_at_beginning` and `compute_fp32_loss` are accepted for old scripts: masks tell padding, and
    losses are always fp32. `attn_implementation`, `stage` and what is raised are as in `create_hf_model`.
    """
    check_model_path(model_name_or_path, "model_name_or_path")
    load = reward_model_loader(model_name_or_path, dropout, attn_implementation)
    check_weights(load, model_name_or_path, fresh_head=not rlhf_training)
    zero_stage = max(zero_stage, _zero_stage(ds_config))
    with _construction(ds_config, zero_stage):
        options = {**_options(ds_config, zero_stage), "stage": stage}
        classifier = _load(load, options, load_in_4bit, fresh_head=not rlhf_training)
        grow_vocabulary(classifier, tokenizer)
        if not rlhf_training:
            draw_head(classifier.score)
    configure_tokens(classifier, tokenizer)
    model = RewardModel(classifier.base_model, classifier.score, classifier.config)
    model.new_tokens = classifier.new_tokens
    finish_stage(model, stage)
    return model


def _options(ds_config: dict[str, Any] | None, stage: int = 0) -> dict[str, Any]:
    """What `from_pretrained` is told: the precision, and where a model that is to be an engine's belongs.

    Weights of an engine, whose configuration has a batch size, go to a GPU one by one, from a file that all
    ranks of a machine map into memory once: its memory never holds a copy per rank. A model whose layers
    ranks are to share is cut on the CPU first.
    """
    options: dict[str, Any] = {"dtype": _dtype(ds_config)}
    is_whole = max(stage, _zero_stage(ds_config)) < 3 and "tensor_parallel" not in (ds_config or {})
    if "train_micro_batch_size_per_gpu" in (ds_config or {}) and is_whole and device_type() != "cpu":
        options["device_map"] = {"": current_device()}
    return options


def _load(
    load: Callable[..., Any], options: dict[str, Any], in_4bit: bool, *, fresh_head: bool = False
) -> Any:
    """The model with its weights, its linear layers packed with `in_4bit`.

    With `fresh_head` the saved head may be missing or of another shape.
    """
    options = {**options, "ignore_mismatched_sizes": fresh_head}
    if not in_4bit:
        return load(**options)
    model = load(**{**options, **four_bit_options(options["dtype"])})
    forget_4bit(model)
    return model


@contextmanager
def _construction(ds_config: dict[str, Any] | None, stage: int) -> Iterator[None]:
    """Shard models that are built inside the block at once if `stage` is 3.

    In a run with tensor ranks that is left to the engines, which shard over the data ranks alone; here it
    would be over all. Where the ranks share the model's layers, those of a machine load it in turn, each
    until it has cut the layers (`dschat.models.tensor_parallel`): the machine never holds a copy per rank.
    """
    if mesh().tensor.size > 1 and "tensor_parallel" in (ds_config or {}):
        await_turn_to_load()
    with quiet_transformers(progress=is_main_process()):
        if stage < 3 or mesh().tensor.size > 1:
            yield
            return
        ds_config = ds_config or {}
        settings: dict[str, Any] = {name: ds_config[name] for name in ("bf16", "fp16") if name in ds_config}
        settings["zero_optimization"] = {**ds_config.get("zero_optimization", {}), "stage": 3}
        if settings["zero_optimization"].get("zero_hpz_partition_size", 1) > 1:
            forget_secondary_group()
        # transformers keeps only a weak reference, so this name must live as long as the block.
        keep_alive = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, **settings})
        try:
            yield
        finally:
            unset_hf_deepspeed_config()
            del keep_alive


def _dtype(ds_config: dict[str, Any] | None) -> torch.dtype:
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if ds_config and ds_config.get(name, {}).get("enabled"):
            return dtype
    return torch.float32


def _zero_stage(ds_config: dict[str, Any] | None) -> int:
    return (ds_config or {}).get("zero_optimization", {}).get("stage", 0)
