"""A model's config.json: read and checked before any weights are."""

from pathlib import Path
from typing import Any

import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    PretrainedConfig,
)

from dschat.console import messages
from dschat.data.files import is_local
from dschat.data.hub import reach_hub
from dschat.errors import UserError
from dschat.models.remote_code import loading_consent, remedy

SCORING = ("ForSequenceClassification", "ForCausalLM")
"""Classes whose checkpoints may be reward models; the second is what DeepSpeed-Chat's config.json says."""

MOST_LAYERS = 10_000
"""More than any model has, by far."""


def read_config(model_name_or_path: str, dropout: float | None, **settings: Any) -> PretrainedConfig:
    """The model's configuration, `dropout` in place of every dropout probability that the family has.

    Other noise of training is switched off with it: dropped layers, an expert router's jitter.
    """
    if not is_local(model_name_or_path):
        reach_hub()
    try:
        config = AutoConfig.from_pretrained(model_name_or_path, **settings, **loading_consent())
    except Exception as error:  # a family's own checks raise what they like
        if needed := remedy(error):
            raise UserError(f"{model_name_or_path!r}: {needed}.") from error
        error_line = " ".join(str(error).split())
        path = Path(model_name_or_path) / "config.json"
        if is_local(path):
            raise UserError(
                f"{path} describes no model that transformers {transformers.__version__} knows "
                f"({error_line}); copy or download the file again, or update transformers."
            ) from error
        error_line = str(error).partition("\n")[0]
        raise UserError(
            f"{model_name_or_path!r} is neither a model's folder nor a hub id that can be reached "
            f"({error_line}); check the name, or download the model and give its folder."
        ) from error
    _check_full_precision(config, model_name_or_path)
    num_layers = getattr(config, "num_hidden_layers", None)
    if isinstance(num_layers, int) and num_layers > MOST_LAYERS:  # building them would not end
        raise UserError(
            f"the config.json of {model_name_or_path!r} asks for more than {MOST_LAYERS:,} layers; copy or "
            "download the file again."
        )
    for name, value in config.to_dict().items():
        if dropout is None or not isinstance(value, float | int) or isinstance(value, bool):
            continue
        if "dropout" in name or "pdrop" in name:
            setattr(config, name, dropout)
        elif name == "layerdrop":
            # Skips whole layers, which ranks under ZeRO-3 would have to agree on.
            setattr(config, name, 0.0)
        elif name == "router_jitter_noise" and config.model_type != "phimoe":
            # Chooses other experts in training than in evaluation. (Phi-MoE's also sets who may be chosen.)
            setattr(config, name, 0.0)
    return config


def _check_full_precision(config: PretrainedConfig, model_name_or_path: str) -> None:
    """Raise `UserError` for weights that are stored in a few bits, which cannot be trained."""
    settings = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if not settings:
        return
    settings = settings if isinstance(settings, dict) else vars(settings)
    method = settings.get("quant_method") or "some method"
    bits = settings.get("bits") or settings.get("num_bits")
    bits = bits or next((n for n in (4, 8) if settings.get(f"load_in_{n}bit")), None)
    how = f"{getattr(method, 'value', method)}{f', {bits} bits' if bits else ''}"
    raise UserError(
        f"the weights of {model_name_or_path!r} are quantised ({how}), says its config.json, and such "
        "weights are not trained: give the checkpoint in full precision that they were made from "
        "(--load_in_4bit packs that one under adapters)."
    )


def check_scores(config: PretrainedConfig, model_name_or_path: str) -> None:
    """Raise `UserError` for a classifier with more than one label, and for a head that is no classifier's.

    `config` is as the file has it.
    """
    architecture = (config.architectures or [""])[0]
    labels = [str(label) for label in (config.id2label or {}).values()]
    if architecture.endswith("ForSequenceClassification") and config.num_labels != 1:
        raise UserError(
            f"num_labels is {config.num_labels} in the config.json of {model_name_or_path!r} "
            f"({', '.join(labels[:5])}{', ...' if len(labels) > 5 else ''}), and a reward model has 1, the "
            "score. Give one with a single label, or train one with step 2 on this model's backbone."
        )
    if "For" in architecture and not architecture.endswith(SCORING):
        raise UserError(
            f"{model_name_or_path!r} is a {architecture}, says its config.json; a reward model is a "
            "...ForSequenceClassification with one label, as step 2 writes it."
        )


def check_generates(config: PretrainedConfig, model_name_or_path: str) -> None:
    """Raise `UserError` for architectures that do not predict each token from those before it alone."""
    check_decoder(config, model_name_or_path)
    brings_its_own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not brings_its_own:
        raise UserError(
            f"{model_name_or_path!r} is a {config.model_type!r} model, for which transformers has no causal "
            "language model, so it cannot generate; choose another architecture."
        )


def check_decoder(config: PretrainedConfig, model_name_or_path: str) -> None:
    """Raise `UserError` for encoders, which transformers loads as language models that see the answer.

    Models that read more than text are refused too.
    """
    fills_gaps = type(config) in MODEL_FOR_MASKED_LM_MAPPING or config.model_type == "bert-generation"
    if config.is_encoder_decoder or (fills_gaps and not getattr(config, "is_decoder", False)):
        kind = "an encoder with a decoder" if config.is_encoder_decoder else "an encoder: it reads both ways"
        raise UserError(
            f"{model_name_or_path!r} is a {config.model_type!r} model, {kind}; "
            "every step needs a decoder, such as Llama, Qwen or GPT-2."
        )
    senses = {"vision_config": "images", "audio_config": "sound", "text_config": "more than text"}
    read = next((what for name, what in senses.items() if getattr(config, name, None) is not None), None)
    if read is not None:
        raise UserError(
            f"{model_name_or_path!r} is a {config.model_type!r} model, which reads {read}; every step "
            "trains on text alone: give a language model. (Some of these have one as a model of its own.)"
        )


def check_classifiable(config: PretrainedConfig, model_name_or_path: str) -> None:
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(
            f"{model_name_or_path!r} is a {config.model_type!r} model, for which transformers has no "
            "sequence classifier, so it cannot become a reward model; choose another architecture."
        )
    check_decoder(config, model_name_or_path)


def check_positions(model_name_or_path: str, num_tokens: int, flag: str, where: str) -> None:
    """Raise `UserError` where `num_tokens` are more than the positions the model has learned.

    `where` says whose length it is, `flag` what bounds it. Rotary positions go on, though the model may not
    follow: that is said once.
    """
    config = read_config(model_name_or_path, dropout=None)
    limit = num_positions(config) or num_tokens
    if num_tokens <= limit:
        return
    problem = f"{where} has {num_tokens} tokens and {model_name_or_path!r} knows {limit} positions"
    if not _has_learned_positions(config):
        messages.note(f"{problem}: what comes after those is new to it.")
        return
    raise UserError(f"{problem}; lower {flag}.")


def learned_positions(model_name_or_path: str) -> int | None:
    """The longest input in tokens, None where positions are computed and go on."""
    config = read_config(model_name_or_path, dropout=None)
    return getattr(config, "max_position_embeddings", None) if _has_learned_positions(config) else None


def num_positions(config: PretrainedConfig) -> int | None:
    """The positions that a model was trained on, or stretched to; None where it does not say."""
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    return max(limit, int(original * factor)) if limit and original and factor else limit


def _has_learned_positions(config: PretrainedConfig) -> bool:
    # GPT-J and CodeGen rotate too, but by a table that ends with their last position.
    return not (getattr(config, "rope_parameters", None) or getattr(config, "alibi", False))


def head_width(config: PretrainedConfig) -> int:
    """Numbers of a head of the model's attention."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
