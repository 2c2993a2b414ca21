"""Adapter folders as PEFT writes them, and the whole model of an adapter and its base."""

import json
import warnings
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import load_state_dict

from dschat.errors import UserError
from dschat.models.config import check_classifiable, check_generates, read_config
from dschat.models.model_folder import ADAPTER_CONFIG, check_model_path
from dschat.models.remote_code import loading_consent
from dschat.models.tokenizer import load_tokenizer
from dschat.models.vocabulary import grow_vocabulary

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
"""The prefix of the names of weights in an adapter's file."""


def is_adapter(path: str) -> bool:
    """Whether it is a folder with an adapter and without a whole model."""
    folder = Path(path)
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def merged_model(
    folder: Path, base: str | None = None, *, task: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model on which the adapter in `folder` was trained, with the adapter merged in, and its tokenizer.

    `base` replaces the name of the model in adapter_config.json, and `task` is PEFT's name of the only kind
    of model that will do. Raises `UserError` for an adapter that is not whole, cannot be merged or does not
    fit the model.
    """
    from peft import PeftModel, get_peft_model_state_dict

    settings = _settings(folder)
    found = settings.get("task_type")
    if task and found not in (None, task):
        raise UserError(f"{folder} is an adapter of task_type {found}; one of {task} is needed here.")
    state = load_state_dict(str(_weights(folder)), map_location="cpu", weights_only=True)
    source = {"revision": settings.get("revision")} if base is None else {}
    base = base or settings["base_model_name_or_path"]
    check_model_path(base, f"the base model of {folder} (--base_model names another)")
    tokenizer = load_tokenizer(_tokenizer_folder(folder) or base)
    is_reward_model = settings.get("task_type") == "SEQ_CLS"
    config = read_config(base, dropout=None, **({"num_labels": 1} if is_reward_model else {}))
    model_class = AutoModelForSequenceClassification if is_reward_model else AutoModelForCausalLM
    if is_reward_model:
        check_classifiable(config, base)
        _check_head(state, folder)
    else:
        check_generates(config, base)
    model = model_class.from_pretrained(base, config=config, dtype="auto", **source, **loading_consent())
    _grow(model, tokenizer, state)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21 asks models by a name that is going
            adapted = PeftModel.from_pretrained(model, folder)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:500]
        raise UserError(f"the adapter in {folder} does not fit {base!r}: {reason}.") from error
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    missing, unexpected = expected - state.keys(), state.keys() - expected
    unexpected -= {PREFIX + name for name in model.state_dict()}  # such as embeddings saved whole
    if missing or unexpected:
        listed = ", ".join(sorted(missing | unexpected)[:5])
        raise UserError(
            f"the adapter in {folder} does not fit {base!r}: {len(missing)} of its weights are missing and "
            f"{len(unexpected)} belong nowhere ({listed}, ...). Give the base that it was trained on."
        )
    return adapted.merge_and_unload(), tokenizer


def _settings(folder: Path) -> dict[str, Any]:
    """The adapter's configuration. Raises `UserError` for one that cannot be merged."""
    path = folder / ADAPTER_CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind, task = settings["peft_type"], settings.get("task_type")
        base = settings.get("base_model_name_or_path")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no adapter's configuration ({type(error).__name__}: {error}); give the folder that "
            "PEFT wrote."
        ) from error
    if not base:
        raise UserError(f"{path} names no base model; give it with --base_model.")
    if "PROMPT" in kind or "PREFIX" in kind or kind == "P_TUNING":
        raise UserError(f"{path}: {kind} learns what stands before the input; weights cannot take that in.")
    if task not in (None, "CAUSAL_LM", "SEQ_CLS"):
        raise UserError(f"{path}: task_type is {task}; an adapter of a language or reward model is needed.")
    return settings


def _weights(folder: Path) -> Path:
    """The file of the adapter's weights. Raises `UserError` where there is none."""
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder} has {ADAPTER_CONFIG} and no weights ({' or '.join(WEIGHTS)}).")
    return found[0]


def _tokenizer_folder(folder: Path) -> str | None:
    """The folder of the adapter's own tokenizer, if any: our exports have it beside the merged model."""
    places = [folder, *([folder.resolve().parent] if folder.resolve().name == "adapter" else [])]
    return next((str(place) for place in places if (place / "tokenizer_config.json").is_file()), None)


def _check_head(state: dict[str, Any], folder: Path) -> None:
    """Raise `UserError` unless the adapter brings a head of one label."""
    head = next((tensor for name, tensor in state.items() if name.endswith("score.weight")), None)
    if head is None:
        raise UserError(f"the adapter in {folder} has no score.weight, so it is no reward model's.")
    if len(head) != 1:
        raise UserError(f"the adapter in {folder} has {len(head)} labels; a reward model has 1, the score.")


def _grow(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, state: dict[str, Any]) -> None:
    """Add the rows to the vocabulary with which the adapter was trained."""
    embedding: Any = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    whole = next((tensor for key, tensor in state.items() if key.endswith(f"{name}.weight")), None)
    if whole is not None and len(whole) > embedding.num_embeddings:
        model.resize_token_embeddings(len(whole), mean_resizing=False)
    grow_vocabulary(model, tokenizer)
