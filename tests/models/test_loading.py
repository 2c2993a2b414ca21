"""Building models: both modes, both spellings, and weights that do not fit are errors that say which."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, save_reward_model, save_tiny_model, tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
)

from dschat.errors import UserError
from dschat.export.export import export_model
from dschat.models.config import check_positions
from dschat.models.loading import create_critic_model, create_hf_model
from dschat.models.model_folder import check_model_path
from dschat.models.preflight import check_language_model, check_reward_model

DS_CONFIG = {
    "zero_optimization": {"stage": 0},
    "train_micro_batch_size_per_gpu": 4,
    "train_batch_size": 16,
}


@pytest.fixture
def base(tmp_path) -> Path:
    return save_tiny_model(tmp_path / "base", "llama")


@pytest.fixture
def reward(base, tmp_path) -> Path:
    export_model(
        create_critic_model(str(base), tiny_tokenizer(), None), tiny_tokenizer(), tmp_path / "reward"
    )
    return tmp_path / "reward"


def edit_weights(folder: Path, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, **settings) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def equal_weights(one, other) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == same and torch.equal(a, b) for (name, a), (same, b) in pairs)


def test_the_published_calls_work_as_written(base, reward):
    from dschat.utils.model.model_utils import create_critic_model
    from dschat.utils.model.reward_model import RewardModel

    path, step2_output = str(base), str(reward)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.eos_token
    fresh = create_critic_model(
        model_name_or_path=path,
        tokenizer=tokenizer,
        ds_config=DS_CONFIG,
        num_padding_at_beginning=1,
        rlhf_training=False,
        compute_fp32_loss=False,
    )
    critic = create_critic_model(
        model_name_or_path=step2_output,
        tokenizer=tokenizer,
        ds_config=DS_CONFIG,
        num_padding_at_beginning=1,
        rlhf_training=True,
        zero_stage=0,
    )
    assert isinstance(fresh, RewardModel)
    assert isinstance(critic, RewardModel)
    assert fresh.v_head.weight.shape == (1, 32)
    assert fresh.v_head.bias is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_critic_has_the_base_models_backbone(family, tmp_path):
    folder = save_tiny_model(tmp_path, family)
    critic = create_critic_model(str(folder), tiny_tokenizer(), DS_CONFIG)
    base = AutoModelForCausalLM.from_pretrained(folder).base_model
    assert equal_weights(critic.rwtransformer, base)
    assert critic.v_head.in_features == (16 if family == "opt_projected" else 32)


def test_a_fresh_head_follows_torchs_seed_and_nothing_else(base):
    def head(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        torch.rand(seed)  # what was drawn in between does not matter
        return create_critic_model(str(base), tiny_tokenizer(), None).v_head.weight

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))
    # 32 draws of standard deviation 1 / sqrt(33) = 0.174, five standard errors of 0.174 / sqrt(64) aside.
    assert head(1).std().item() == pytest.approx(0.174, abs=0.109)


def test_the_saved_head_is_loaded_and_not_drawn(reward):
    critic = create_critic_model(str(reward), tiny_tokenizer(), None, rlhf_training=True)
    assert torch.equal(critic.v_head.weight, load_file(reward / "model.safetensors")["score.weight"])


def test_a_fresh_head_on_a_reward_model_is_said(reward, capsys):
    torch.manual_seed(5)
    critic = create_critic_model(str(reward), tiny_tokenizer(), None)
    assert "a fresh one takes its place" in capsys.readouterr().out
    assert not torch.equal(critic.v_head.weight, load_file(reward / "model.safetensors")["score.weight"])


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


def test_dropout_replaces_every_probability(tmp_path):
    gpt2 = str(save_tiny_model(tmp_path / "gpt2", "gpt2"))
    config = create_hf_model(AutoModelForCausalLM, gpt2, tiny_tokenizer(), dropout=0.25).config
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.25, 0.25, 0.25)
    opt = save_tiny_model(tmp_path / "opt", "opt")
    edit_json(opt / "config.json", layerdrop=0.5)
    config = create_hf_model(AutoModelForCausalLM, str(opt), tiny_tokenizer(), dropout=0.25).config
    assert (config.dropout, config.attention_dropout, config.layerdrop) == (0.25, 0.25, 0.0)
    critic = create_critic_model(gpt2, tiny_tokenizer(), None, dropout=0.0)
    assert {module.p for module in critic.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


def test_an_expert_router_adds_no_noise(tmp_path):
    folder = save_tiny_model(tmp_path, "mixtral")
    edit_json(folder / "config.json", router_jitter_noise=0.25)
    model = create_hf_model(AutoModelForCausalLM, str(folder), tiny_tokenizer(), dropout=0.0).train()
    tokens = torch.arange(5, 25).unsqueeze(0)
    assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_precision_follows_the_deepspeed_configuration(base):
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("none", torch.float32)):
        config = DS_CONFIG | {name: {"enabled": True}}
        critic = create_critic_model(str(base), tiny_tokenizer(), config)
        assert {p.dtype for p in critic.parameters()} == {dtype}


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt_projected"])
def test_the_vocabulary_grows_with_the_tokenizer_and_is_reloadable(family, tmp_path):
    tokenizer = tiny_tokenizer()
    folder = save_tiny_model(tmp_path / "base", family, tokenizer=tokenizer)
    old = len(tokenizer)
    tokenizer.add_tokens(["<|one|>", "<|two|>"])
    model = create_hf_model(AutoModelForCausalLM, str(folder), tokenizer)
    before = AutoModelForCausalLM.from_pretrained(folder)
    for grown, kept in (
        (model.get_input_embeddings(), before.get_input_embeddings()),
        (model.get_output_embeddings(), before.get_output_embeddings()),
    ):
        assert torch.equal(grown.weight[:old], kept.weight)
        torch.testing.assert_close(grown.weight[old:], kept.weight.mean(dim=0).expand(2, -1))
    assert model.config.vocab_size == old + 2
    export_model(model, tokenizer, tmp_path / "grown")
    assert equal_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "grown"), model)


@pytest.mark.parametrize("family", ["phi", "gptj"])
def test_the_bias_of_an_output_layer_grows_too(family, tmp_path):
    tokenizer = tiny_tokenizer()
    folder = save_tiny_model(tmp_path, family, tokenizer=tokenizer)
    bias = torch.arange(len(tokenizer)).float()
    edit_weights(folder, lambda weights: weights.update({"lm_head.bias": bias}))
    tokenizer.add_tokens(["<|one|>", "<|two|>"])
    grown = create_hf_model(AutoModelForCausalLM, str(folder), tokenizer).lm_head.bias
    assert torch.equal(grown, torch.cat([bias, bias.mean().expand(2)]))


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma", "bloom", "falcon"])
def test_tied_embeddings_stay_tied_when_the_vocabulary_grows(family, tmp_path):
    tokenizer = tiny_tokenizer()
    folder = save_tiny_model(tmp_path / "base", family, tokenizer=tokenizer)
    tokenizer.add_tokens(["<|one|>"])
    export_model(create_hf_model(AutoModelForCausalLM, str(folder), tokenizer), tokenizer, tmp_path / "grown")
    loaded = create_hf_model(AutoModelForCausalLM, str(tmp_path / "grown"), tokenizer)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert loaded.get_input_embeddings().num_embeddings == len(tokenizer)
    names = load_file(tmp_path / "grown" / "model.safetensors").keys()
    assert not [name for name in names if name.startswith("lm_head")]


def test_a_vocabulary_larger_than_the_tokenizers_is_left_alone(tmp_path):
    folder = save_tiny_model(tmp_path, "llama", vocab_size=500)
    model = create_hf_model(AutoModelForCausalLM, str(folder), tiny_tokenizer())
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 500


def test_special_tokens_are_the_tokenizers(base):
    tokenizer = tiny_tokenizer(bos=True)
    model = create_hf_model(AutoModelForCausalLM, str(base), tokenizer)
    for config in (model.config, model.generation_config):
        ids = (config.eos_token_id, config.pad_token_id, config.bos_token_id)
        assert ids == (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id)


def test_the_end_token_learns_even_where_it_pads(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    folder = save_tiny_model(tmp_path, "llama", tokenizer=tokenizer)
    critic = create_critic_model(str(folder), tokenizer, None)
    critic(torch.tensor([[5, tokenizer.eos_token_id]]), return_values=True).sum().backward()
    assert critic.rwtransformer.embed_tokens.weight.grad[tokenizer.eos_token_id].any()


def test_caches_are_off_in_training_and_on_in_generation(base):
    model = create_hf_model(AutoModelForCausalLM, str(base), tiny_tokenizer())
    assert model(torch.tensor([[5, 6]])).past_key_values is None
    lengths = []
    model.model.register_forward_pre_hook(
        lambda _, args, options: lengths.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert lengths == [3, 1, 1]


def test_sampling_settings_without_their_switch_can_be_saved(base, tmp_path):
    edit_json(base / "generation_config.json", temperature=0.6, do_sample=False)
    model = create_hf_model(AutoModelForCausalLM, str(base), tiny_tokenizer())
    export_model(model, tiny_tokenizer(), tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (saved["temperature"], saved["do_sample"]) == (0.6, True)


def test_an_architecture_without_classifier_cannot_score(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="'clip'"):
        create_critic_model(str(tmp_path), tiny_tokenizer(), None)


def test_a_cut_off_weight_file_is_an_error(base):
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        create_hf_model(AutoModelForCausalLM, str(base), tiny_tokenizer())


def test_a_complete_folder_passes_and_a_hub_id_is_left_to_the_hub(base):
    check_model_path(str(base), "--model_name_or_path")
    check_model_path("facebook/opt-350m", "--model_name_or_path")
    check_model_path("gpt2", "--model_name_or_path")


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "../nowhere", "output/step1/model"])
def test_a_path_that_does_not_exist_is_an_error(path):
    with pytest.raises(UserError, match=r"--actor_model_name_or_path .* there is no such folder"):
        check_model_path(path, "--actor_model_name_or_path")


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


def test_one_slash_is_a_path_below_a_folder_that_is_here_and_a_hub_id_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_model_path("output/reward", "--critic_model_name_or_path")
    (tmp_path / "output").mkdir()
    with pytest.raises(UserError, match="'output/reward': there is no such folder"):
        check_model_path("output/reward", "--critic_model_name_or_path")


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
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(folder)(tokens)
    with pytest.raises(UserError, match=r"513 tokens .* 512 positions; lower --max_seq_len"):
        check_positions(str(folder), 513, "--max_seq_len", "the longest row")


@pytest.mark.parametrize("family", ["bloom", "falcon_alibi"])
def test_models_that_know_no_positions_have_no_limit(family, tmp_path):
    check_positions(str(save_tiny_model(tmp_path, family)), 10_000, "--max_seq_len", "the longest row")


def test_actor_and_reward_model_cannot_be_swapped(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    reward = save_reward_model(base, tmp_path / "reward")
    check_language_model(str(base), "--actor_model_name_or_path")
    check_reward_model(str(reward), "--critic_model_name_or_path")
    with pytest.raises(UserError, match=r"--actor_model_name_or_path: .*This is a reward model"):
        check_language_model(str(reward), "--actor_model_name_or_path")
    with pytest.raises(UserError, match=r"--critic_model_name_or_path: .*not from a base model"):
        check_reward_model(str(base), "--critic_model_name_or_path")


def test_a_folder_must_have_configuration_and_weights(base):
    (base / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"--model_name_or_path .* has no weights"):
        check_model_path(str(base), "--model_name_or_path")
    (base / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        check_model_path(str(base), "--model_name_or_path")


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


FORMS = ("model.safetensors", "pytorch_model.bin")


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


def tiny_encoder(model_type: str, **settings) -> PretrainedConfig:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    return AutoConfig.for_model(model_type, **shape, vocab_size=400, **settings)


ENCODERS = {
    "bert": lambda: AutoModelForMaskedLM.from_config(tiny_encoder("bert")),
    "roberta": lambda: AutoModelForMaskedLM.from_config(tiny_encoder("roberta")),
    "bert-generation": lambda: AutoModelForCausalLM.from_config(tiny_encoder("bert-generation")),
    "distilbert": lambda: AutoModelForMaskedLM.from_config(
        AutoConfig.for_model("distilbert", dim=32, n_layers=1, n_heads=4, hidden_dim=64, vocab_size=400)
    ),
    "t5": lambda: AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("t5", d_model=32, d_kv=8, num_layers=1, num_heads=4, d_ff=64, vocab_size=400)
    ),
}


@pytest.mark.parametrize("model_type", ENCODERS)
def test_an_encoder_is_no_language_model_and_no_reward_model(model_type, tmp_path):
    ENCODERS[model_type]().save_pretrained(tmp_path)
    pattern = rf"'{model_type}' model, an encoder"
    with pytest.raises(UserError, match=rf"--model_name_or_path: .*{pattern}"):
        check_language_model(str(tmp_path), "--model_name_or_path")
    with pytest.raises(UserError, match=pattern):
        create_hf_model(AutoModelForCausalLM, str(tmp_path), tiny_tokenizer())
    with pytest.raises(UserError, match=pattern if model_type != "bert-generation" else "no sequence class"):
        create_critic_model(str(tmp_path), tiny_tokenizer(), None)


def test_an_encoders_architecture_set_to_read_from_left_to_right_is_a_language_model(tmp_path):
    AutoModelForCausalLM.from_config(tiny_encoder("bert", is_decoder=True)).save_pretrained(tmp_path)
    check_language_model(str(tmp_path), "--model_name_or_path")


def test_what_transformers_wrote_as_a_classifier_loads_too(base, tmp_path):
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    classifier.save_pretrained(tmp_path / "classifier")
    critic = create_critic_model(str(tmp_path / "classifier"), tiny_tokenizer(), None, rlhf_training=True)
    assert torch.equal(critic.v_head.weight, classifier.score.weight)
