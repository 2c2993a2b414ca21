"""Checks of models before any weights are in memory."""

import pytest
from saved_models import edit_json, edit_weights
from tiny import save_reward_model, save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from dschat.errors import UserError
from dschat.models.loading import create_hf_model
from dschat.models.preflight import check_backbone, check_language_model, check_reward_model, meta_model
from dschat.models.reward_model import RewardModel


def test_a_name_too_long_for_a_path_is_no_model(tmp_path):
    with pytest.raises(UserError, match="is neither a model's folder nor a hub id"):
        check_language_model("x" * 300, "--model_name_or_path")


@pytest.mark.parametrize("num_layers", [10**6, 10**30, 10**700])
def test_a_number_of_layers_that_no_model_has_is_refused_before_they_are_built(num_layers, base):
    edit_json(base / "config.json", num_hidden_layers=num_layers)
    with pytest.raises(
        UserError, match=r"--model_name_or_path: the config\.json of .* asks for more than 10,000 layers"
    ):
        check_language_model(str(base), "--model_name_or_path")


def test_actor_and_reward_model_cannot_be_swapped(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    reward = save_reward_model(base, tmp_path / "reward")
    check_language_model(str(base), "--actor_model_name_or_path")
    check_reward_model(str(reward), "--critic_model_name_or_path")
    with pytest.raises(UserError, match=r"--actor_model_name_or_path: .*This is a reward model"):
        check_language_model(str(reward), "--actor_model_name_or_path")
    with pytest.raises(UserError, match=r"--critic_model_name_or_path: .*not from a base model"):
        check_reward_model(str(base), "--critic_model_name_or_path")


def test_any_model_with_a_classifier_has_a_backbone_for_a_reward_model(base, reward, capsys):
    check_backbone(str(base), "--model_name_or_path")
    assert "reward head" not in capsys.readouterr().out
    check_backbone(str(reward), "--model_name_or_path")
    assert "has a reward head; a fresh one takes its place" in capsys.readouterr().out
    edit_weights(base, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(UserError, match=r"^--model_name_or_path: the weights .*missing: model\.norm\.weight"):
        check_backbone(str(base), "--model_name_or_path")


def test_a_meta_model_has_the_shapes_of_the_loaded_one_and_no_weights(base):
    loaded = create_hf_model(AutoModelForCausalLM, str(base), tiny_tokenizer())
    model = meta_model(str(base), is_reward_model=False)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in loaded.named_parameters()}
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_the_meta_model_of_a_reward_model_has_one_score(base):
    model = meta_model(str(base), is_reward_model=True)
    assert isinstance(model, RewardModel)
    assert list(model.v_head.weight.shape) == [1, model.config.hidden_size]
    assert model.v_head.weight.is_meta


def test_a_meta_model_needs_a_configuration_that_can_score(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        meta_model(str(tmp_path), is_reward_model=False)
