"""Weights on disk: what loads them, and whether they fit the configuration beside them."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PretrainedConfig
from transformers.modeling_utils import load_state_dict
from transformers.utils import logging as transformers_logging

from dschat.console import messages
from dschat.distributed.mesh import Axis
from dschat.errors import UserError
from dschat.models.attention import set_attention
from dschat.models.config import check_classifiable, read_config
from dschat.models.remote_code import loading_consent
from dschat.models.stage import built_as_stage

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
"""The head of a reward model in transformers' classifiers."""


def reward_model_loader(
    model_name_or_path: str, dropout: float | None, attn_implementation: str | None = None
) -> Callable[..., Any]:
    """A function that loads a sequence classifier of one label, like `from_pretrained` without its name.

    Raises `UserError` for architectures without one.
    """
    config = read_config(model_name_or_path, dropout, num_labels=1, problem_type=None)
    check_classifiable(config, model_name_or_path)
    set_attention(config, attn_implementation)
    model_class: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    state = _deepspeed_chat_state(Path(model_name_or_path), model_class.base_model_prefix)
    return weights_loader(model_class, model_name_or_path, config, state)


def weights_loader(
    model_class: Any, model_name_or_path: str, config: PretrainedConfig, state: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """`from_pretrained` of `model_class` with the weights of a folder or hub id, or with `state` if given.

    The function's option `stage` is that of a pipeline whose layers alone are built and read.
    """

    def load(*, stage: Axis | None = None, **options: Any) -> Any:
        built = model_class if stage is None else built_as_stage(model_class, config, stage)
        if state is None:
            return built.from_pretrained(model_name_or_path, config=config, **options, **loading_consent())
        on_meta = options.get("device_map") == "meta"
        tensors = {name: tensor.to("meta") for name, tensor in state.items()} if on_meta else state
        return built.from_pretrained(None, config=config, state_dict=tensors, **options)

    return load


def check_weights(load: Callable[..., Any], model_name_or_path: str, fresh_head: bool | None = None) -> None:
    """Raise `UserError` that lists the weights which are missing, unexpected or of another shape.

    `load` runs on the meta device, which takes no memory and is the same for every ZeRO stage: at stage 3
    transformers reports no unexpected keys. With `fresh_head` the weights are those of a base model, whose
    output layer is ignored and whose head is still to be drawn.
    """
    info = _loading_info(load, model_name_or_path)
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


def has_head(load: Callable[..., Any], model_name_or_path: str) -> bool:
    """Whether the weights hold a reward model's head; `load` is that of `reward_model_loader`."""
    return HEAD not in _loading_info(load, model_name_or_path)["missing_keys"]


def _loading_info(load: Callable[..., Any], model_name_or_path: str) -> dict[str, Any]:
    """What transformers reports of loading on the meta device. Raises `UserError` where that fails."""
    try:
        with quiet_transformers(progress=False):
            _, info = load(device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True)
    except (OSError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"the weights of {model_name_or_path!r} cannot be read: {error}") from error
    except Exception as error:  # whatever the family's code makes of values that it does not expect
        raise UserError(
            f"the model that config.json of {model_name_or_path!r} describes cannot be built "
            f"({type(error).__name__}: {' '.join(str(error).split())}); copy or download the file again."
        ) from error
    return info


def _remedy(missing: set[str], unexpected: set[str]) -> str:
    """The remedy for weights that do not fit, in words."""
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
    """The first keys in one line, and how many more there are."""
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(sorted(keys)[:limit]) + more


def _deepspeed_chat_state(folder: Path, prefix: str) -> dict[str, torch.Tensor] | None:
    """The weights of a DeepSpeed-Chat reward model under transformers' names; None for other folders."""
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
def quiet_transformers(progress: bool) -> Iterator[None]:
    """Hide reports of loading, which `check_weights` makes errors of, and bars without `progress`."""
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
