"""Building models: both modes, both spellings, and weights that do not fit are errors that say which."""

import json

import pytest
import torch
from safetensors.torch import load_file
from saved_models import edit_json, edit_weights, equal_weights
from tiny import FAMILIES, save_tiny_model, tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
)

from dschat.engines.deepspeed_config import get_eval_ds_config, get_train_ds_config
from dschat.errors import UserError
from dschat.export.export import export_model
from dschat.models import loading
from dschat.models.loading import create_critic_model, create_hf_model
from dschat.models.preflight import check_language_model

DS_CONFIG = {
    "zero_optimization": {"stage": 0},
    "train_micro_batch_size_per_gpu": 4,
    "train_batch_size": 16,
}


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


def test_only_the_weights_of_an_engine_are_loaded_onto_a_gpu(monkeypatch):
    monkeypatch.setattr(loading, "device_type", lambda: "cuda")
    monkeypatch.setattr(loading, "current_device", lambda: torch.device("cuda", 1))
    for config in (None, {"bf16": {"enabled": True}}):  # as the export reads a model back, on the CPU
        assert "device_map" not in loading._options(config)
    for stage, is_mapped in ((0, True), (2, True), (3, False)):
        options = loading._options(get_train_ds_config(stage=stage))
        assert ("device_map" in options) is is_mapped
    assert "device_map" not in loading._options(get_train_ds_config(stage=0, tensor_parallel_size=2))
    assert "device_map" in loading._options(get_eval_ds_config(stage=0))
