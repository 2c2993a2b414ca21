"""Preflight checks: whether a model can be loaded, and its modules, before any weights are in memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from dschat.errors import UserError
from dschat.models.config import check_classifiable, check_generates, check_scores, read_config
from dschat.models.model_folder import check_model_path
from dschat.models.remote_code import loading_consent
from dschat.models.reward_model import RewardModel
from dschat.models.weights import check_weights, reward_model_loader, weights_loader

SCORES: dict[str, Any] = {"num_labels": 1, "problem_type": None}
"""The settings of a configuration by which a classifier is a reward model."""


def check_language_model(model_name_or_path: str, flag: str) -> None:
    """Raise `UserError` naming `flag` unless this is a whole causal language model. Takes no memory."""
    check_model_path(model_name_or_path, flag)
    with _named(flag):
        config = read_config(model_name_or_path, dropout=None)
        check_generates(config, model_name_or_path)
        check_weights(weights_loader(AutoModelForCausalLM, model_name_or_path, config), model_name_or_path)


def check_backbone(model_name_or_path: str, flag: str) -> None:
    """Raise `UserError` naming `flag` unless a reward model can be made of this model, its head ignored."""
    check_model_path(model_name_or_path, flag)
    with _named(flag):
        load = reward_model_loader(model_name_or_path, dropout=None)
        check_weights(load, model_name_or_path, fresh_head=True)


def check_reward_model(model_name_or_path: str, flag: str) -> None:
    """Raise `UserError` naming `flag` unless this is a whole reward model, backbone and head."""
    check_model_path(model_name_or_path, flag)
    with _named(flag):
        check_scores(read_config(model_name_or_path, dropout=None), model_name_or_path)
        check_weights(reward_model_loader(model_name_or_path, dropout=None), model_name_or_path)


def meta_model(model_name_or_path: str, *, is_reward_model: bool) -> PreTrainedModel | RewardModel:
    """The model that would be trained, without weights: on the meta device, from its configuration alone.

    Raises `UserError` where there is no configuration, or none that can become a reward model.
    """
    config = read_config(model_name_or_path, dropout=None, **(SCORES if is_reward_model else {}))
    if is_reward_model:
        check_classifiable(config, model_name_or_path)
    return meta_model_of(config, is_reward_model=is_reward_model)


def meta_model_of(
    config: PretrainedConfig, *, is_reward_model: bool, dtype: torch.dtype = torch.float32
) -> PreTrainedModel | RewardModel:
    """The model of a configuration (a reward model's has the settings `SCORES`) on the meta device."""
    model_class: Any = AutoModelForSequenceClassification if is_reward_model else AutoModelForCausalLM
    with torch.device("meta"):
        model = model_class.from_config(config, dtype=dtype, **loading_consent())
    return RewardModel(model.base_model, model.score, config) if is_reward_model else model


@contextmanager
def _named(flag: str) -> Iterator[None]:
    """Put the flag before the message of a `UserError`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error
