"""What a model's config.json says against training it, told before weights are read."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from saved_models import edit_json
from tiny import save_tiny_model, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3Config,
    LlavaConfig,
    Qwen2AudioConfig,
)

from dschat.errors import UserError
from dschat.models.config import check_positions
from dschat.models.loading import create_critic_model
from dschat.models.preflight import check_backbone, check_language_model, check_reward_model

FLAG = "--model_name_or_path"


def edit_config(folder: Path, **settings) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return str(folder)


@pytest.mark.parametrize(
    ("settings", "how"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "gptq, 4 bits"),
        ({"quant_method": "awq", "bits": 4, "zero_point": True}, "awq, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, "bitsandbytes, 4"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
    ],
)
def test_quantised_weights_are_named_as_such(settings, how, tmp_path):
    path = edit_config(save_tiny_model(tmp_path), quantization_config=settings)
    for check in (check_language_model, check_backbone, check_reward_model):
        problem = rf"{FLAG}: the weights of .* are quantised \({re.escape(how)}.*in full precision"
        with pytest.raises(UserError, match=problem):
            check(path, FLAG)


@pytest.fixture(scope="module")
def two_labels(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("two")
    save_tiny_model(folder / "base")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=2)
    model.save_pretrained(folder / "rm2")
    tiny_tokenizer().save_pretrained(folder / "rm2")
    return str(folder / "rm2")


def test_a_classifier_of_two_labels_is_no_reward_model(two_labels):
    problem = r"num_labels is 2 in the config.json of .*LABEL_0, LABEL_1\), and a reward model has 1"
    with pytest.raises(UserError, match=problem):
        check_reward_model(two_labels, FLAG)


def test_but_its_backbone_can_become_one(two_labels, capsys):
    check_backbone(two_labels, FLAG)
    assert "a fresh one takes its place" in capsys.readouterr().out
    critic = create_critic_model(two_labels, tiny_tokenizer(), None)
    assert critic.v_head.weight.shape == (1, 32)
    assert critic.v_head.weight.abs().sum() > 0
    state = load_file(f"{two_labels}/model.safetensors")
    assert torch.equal(critic.rwtransformer.embed_tokens.weight, state["model.embed_tokens.weight"])


@pytest.mark.parametrize("architecture", ["LlamaForTokenClassification", "Qwen2ForRewardModel"])
def test_another_head_is_named(architecture, tmp_path):
    path = edit_config(save_tiny_model(tmp_path), architectures=[architecture])
    with pytest.raises(UserError, match=f"is a {architecture}.*ForSequenceClassification with one label"):
        check_reward_model(path, FLAG)


@pytest.mark.parametrize(
    ("config", "what"), [(Gemma3Config, "images"), (LlavaConfig, "images"), (Qwen2AudioConfig, "sound")]
)
def test_models_that_read_more_than_text_are_refused(config, what, tmp_path):
    save_tiny_model(tmp_path)
    config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"reads {what}; every step trains on text alone"):
        check_language_model(str(tmp_path), FLAG)


def test_lengths_beyond_learned_positions_are_an_error_and_beyond_rotary_ones_a_note(tmp_path, capsys):
    learned, rotary = save_tiny_model(tmp_path / "gpt2", "gpt2"), save_tiny_model(tmp_path / "llama", "llama")
    check_positions(str(learned), 512, "--max_seq_len", "the longest row")
    with pytest.raises(UserError, match=r"longest row has 513 tokens .* 512 positions; lower --max_seq_len"):
        check_positions(str(learned), 513, "--max_seq_len", "the longest row")
    check_positions(str(rotary), 513, "--max_seq_len", "the longest row")
    assert "512 positions" in capsys.readouterr().out


def test_positions_that_are_stretched_count(tmp_path, capsys):
    folder = save_tiny_model(tmp_path)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1e4}
    edit_json(folder / "config.json", rope_parameters=yarn)
    check_positions(str(folder), 2048, "--max_seq_len", "the longest row")
    assert "positions" not in capsys.readouterr().out
    check_positions(str(folder), 2049, "--max_seq_len", "the longest row")
    assert "has 2049 tokens and" in (said := capsys.readouterr().out)
    assert "knows 2048 positions" in said


def test_a_table_of_rotations_ends_as_learned_positions_do(tmp_path):
    folder = save_tiny_model(tmp_path, "gptj")
    tokens = torch.full((1, 513), 5)
    with pytest.raises((RuntimeError, IndexError)):
        AutoModelForCausalLM.from_pretrained(folder)(tokens)
    with pytest.raises(UserError, match=r"513 tokens .* 512 positions; lower --max_seq_len"):
        check_positions(str(folder), 513, "--max_seq_len", "the longest row")


@pytest.mark.parametrize("family", ["bloom", "falcon_alibi"])
def test_models_that_know_no_positions_have_no_limit(family, tmp_path):
    check_positions(str(save_tiny_model(tmp_path, family)), 10_000, "--max_seq_len", "the longest row")
