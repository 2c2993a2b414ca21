"""Weights on disk: both spellings, shards, and what does not fit is an error that lists it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import edit_weights, equal_weights
from tiny import FAMILIES, save_reward_model, save_tiny_model, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
)

from dschat.errors import UserError
from dschat.models.loading import create_critic_model, create_hf_model
from dschat.models.model_folder import check_model_path
from dschat.models.preflight import check_language_model, check_reward_model

DS_CONFIG = {"zero_optimization": {"stage": 0}, "train_micro_batch_size_per_gpu": 4, "train_batch_size": 16}

FORMS = ("model.safetensors", "pytorch_model.bin")


@pytest.mark.parametrize("spelling", ["rwtransformer", "rwtranrsformer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_deepspeed_chat_checkpoint_gives_the_model_it_was_saved_from(spelling, family, tmp_path):
    base = save_tiny_model(tmp_path / "base", family)
    source = create_critic_model(str(base), tiny_tokenizer(), None)
    folder = tmp_path / "deepspeed_chat"
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    state = {name.replace("rwtransformer", spelling): p.half() for name, p in source.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    critic = create_critic_model(str(folder), tiny_tokenizer(), None, rlhf_training=True)
    assert equal_weights(critic, source.half().float())


def test_a_pickle_that_runs_code_is_refused(base):
    (base / "model.safetensors").unlink()
    torch.save({"v_head.weight": Path("anything but a tensor")}, base / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        create_critic_model(str(base), tiny_tokenizer(), None, rlhf_training=True)


def test_missing_and_unexpected_keys_are_both_listed(reward):
    def edit(weights):
        weights["surprise"] = weights.pop("model.norm.weight")

    edit_weights(reward, edit)
    for rlhf_training in (True, False):
        with pytest.raises(UserError, match=r"missing: model\.norm\.weight; unexpected: surprise"):
            create_critic_model(str(reward), tiny_tokenizer(), None, rlhf_training=rlhf_training)


def test_a_missing_key_of_a_deepspeed_chat_checkpoint_is_listed(base):
    state = create_critic_model(str(base), tiny_tokenizer(), None).state_dict()
    del state["v_head.weight"]
    (base / "model.safetensors").unlink()
    torch.save(state, base / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"missing: score\.weight"):
        create_critic_model(str(base), tiny_tokenizer(), None, rlhf_training=True)


def test_a_base_model_is_no_reward_model(base):
    with pytest.raises(UserError, match=r"missing: score\.weight.*comes from step 2"):
        create_critic_model(str(base), tiny_tokenizer(), None, rlhf_training=True)


def test_a_weight_of_another_shape_is_an_error(base):
    edit_weights(base, lambda weights: weights.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(UserError, match=r"of another shape: model\.norm\.weight \[7\] not \[32\]"):
        create_hf_model(AutoModelForCausalLM, str(base), tiny_tokenizer())


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_weights_are_not_missing(family, tmp_path):
    folder = save_tiny_model(tmp_path, family)
    model = create_hf_model(AutoModelForCausalLM, str(folder), tiny_tokenizer(), DS_CONFIG)
    assert equal_weights(model, AutoModelForCausalLM.from_pretrained(folder))


def test_a_cut_off_weight_file_is_an_error(base):
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        create_hf_model(AutoModelForCausalLM, str(base), tiny_tokenizer())


def in_shards(folder: Path, form: str) -> None:
    """Divide the folder's weights over two files, with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, _, ending = form.rpartition(".")
    weight_map = {}
    for part in (1, 2):
        name = f"{stem}-0000{part}-of-00002.{ending}"
        tensors = dict(list(weights.items())[part - 1 :: 2])
        if ending == "bin":
            torch.save(tensors, folder / name)
        else:
            save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (folder / f"{form}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_shards_give_the_model_that_was_divided(family, form, tmp_path):
    base = save_tiny_model(tmp_path / "base", family)
    reward = save_reward_model(base, tmp_path / "reward")
    model = AutoModelForCausalLM.from_pretrained(base)
    critic = create_critic_model(str(reward), tiny_tokenizer(), None, rlhf_training=True)
    for folder in (base, reward):
        in_shards(folder, form)
    check_language_model(str(base), "--actor_model_name_or_path")
    check_reward_model(str(reward), "--critic_model_name_or_path")
    assert equal_weights(create_hf_model(AutoModelForCausalLM, str(base), tiny_tokenizer()), model)
    fresh = create_critic_model(str(base), tiny_tokenizer(), None)
    assert equal_weights(fresh.rwtransformer, model.base_model)
    assert equal_weights(create_critic_model(str(reward), tiny_tokenizer(), None, rlhf_training=True), critic)


@pytest.mark.parametrize("form", FORMS)
def test_every_shard_must_be_there(form, base):
    in_shards(base, form)
    shard = next(base.glob("*-00002-of-00002*"))
    shard.unlink()
    with pytest.raises(UserError, match=f"--model_name_or_path .* lacks 1 of the 2 .*{shard.name}"):
        check_model_path(str(base), "--model_name_or_path")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, "[]", "{}", '{"weight_map": ["model.safetensors"]}', '{"weight_map": {"a": 1}}'],
)
@pytest.mark.parametrize("form", FORMS)
def test_a_malformed_shard_index_is_an_error_that_names_it(form, text, base):
    in_shards(base, form)
    index = base / f"{form}.index.json"
    index.write_text(text)
    with pytest.raises(UserError, match=rf"--model_name_or_path: .*{index.name} is no index"):
        check_model_path(str(base), "--model_name_or_path")


def with_causal_masks(weights: dict[str, torch.Tensor], attention: str) -> None:
    """Add what transformers before version 5 kept beside the weights of GPT-2, GPT-J and GPT-NeoX."""
    for layer in range(2):
        weights[f"{attention.format(layer)}.bias"] = torch.ones(1, 1, 512, 512).tril().bool()
        weights[f"{attention.format(layer)}.masked_bias"] = torch.tensor(-1e9)


OLD_FILES = {
    "gpt2": lambda weights: with_causal_masks(weights, "transformer.h.{}.attn"),
    "gptj": lambda weights: with_causal_masks(weights, "transformer.h.{}.attn"),
    "gpt_neox": lambda weights: with_causal_masks(weights, "gpt_neox.layers.{}.attention"),
    "llama": lambda weights: weights.update(
        {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(2)}
    ),
}


@pytest.mark.parametrize("family", OLD_FILES)
def test_constants_that_older_versions_saved_are_no_unexpected_weights(family, tmp_path):
    folder = save_tiny_model(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    edit_weights(folder, OLD_FILES[family])
    check_language_model(str(folder), "--model_name_or_path")
    assert equal_weights(create_hf_model(AutoModelForCausalLM, str(folder), tiny_tokenizer()), model)
    critic = create_critic_model(str(folder), tiny_tokenizer(), None)
    assert equal_weights(critic.rwtransformer, model.base_model)


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_weights_without_the_backbones_prefix_load(family, tmp_path):
    folder = save_tiny_model(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(folder)

    def strip(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            weights[name.removeprefix("transformer.")] = weights.pop(name)

    edit_weights(folder, strip)
    check_language_model(str(folder), "--model_name_or_path")
    assert equal_weights(create_hf_model(AutoModelForCausalLM, str(folder), tiny_tokenizer()), model)
