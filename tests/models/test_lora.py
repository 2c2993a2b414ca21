"""Adapters: where they go, what is trained with them, and what a merged weight is."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny import FAMILIES, TEXTS, save_tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from dschat.arguments import ModelArguments
from dschat.errors import UserError
from dschat.models.loading import create_critic_model, create_hf_model
from dschat.models.lora import (
    adapters_fused,
    adapters_off,
    add_lora,
    check_adapters,
    is_adapter,
    merge_lora,
    trains_adapters_only,
    will_train_adapters_only,
)
from dschat.models.reward_model import RewardModel, enable_gradient_checkpointing


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("base"), request.param))


@pytest.fixture(scope="module")
def opt_projected(tmp_path_factory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("opt"), "opt_projected"))


def causal(folder: str, **settings) -> PreTrainedModel:
    return create_hf_model(AutoModelForCausalLM, folder, tiny_tokenizer(), **settings)


def critic(folder: str) -> RewardModel:
    return create_critic_model(folder, tiny_tokenizer(), None)


def lora(**settings) -> ModelArguments:
    return ModelArguments(model_name_or_path="base", **{"lora_dim": 4, **settings})


def adapted(model: nn.Module) -> set[str]:
    return {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def batch() -> dict[str, Tensor]:
    tokens = tiny_tokenizer()(list(TEXTS), padding=True, padding_side="right", return_tensors="pt")
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


# B A = [[1], [2]] [[0.5, -1, 0]] = [[0.5, -1, 0], [1, -2, 0]], times alpha / r = 4 / 1.
UPDATE = [[2.0, -4.0, 0.0], [4.0, -8.0, 0.0]]


def merged(weight: Tensor, **settings) -> dict[str, Tensor]:
    state = {
        "x.base_layer.weight": weight,
        "x.base_layer.bias": torch.tensor([7.0]),
        "x.lora_A.default.weight": torch.tensor([[0.5, -1.0, 0.0]]),
        "x.lora_B.default.weight": torch.tensor([[1.0], [2.0]]),
        "other.weight": torch.tensor([9.0]),
    }
    return merge_lora(state, LoraConfig(r=1, lora_alpha=4, **settings))


def test_a_merged_weight_is_w_plus_alpha_over_r_times_b_a():
    weights = merged(torch.full((2, 3), 10.0))
    assert weights.keys() == {"x.weight", "x.bias", "other.weight"}
    assert weights["x.weight"].tolist() == [[12.0, 6.0, 10.0], [14.0, 2.0, 10.0]]
    assert (weights["x.bias"].item(), weights["other.weight"].item()) == (7.0, 9.0)


def test_a_weight_stored_as_in_by_out_gets_the_transpose():
    weights = merged(torch.zeros(3, 2), fan_in_fan_out=True)
    assert weights["x.weight"].tolist() == [list(column) for column in zip(*UPDATE, strict=True)]


def test_rank_stabilised_adapters_are_scaled_by_the_root_of_the_rank():
    state = {
        "x.base_layer.weight": torch.zeros(1, 1),
        "x.lora_A.default.weight": torch.ones(4, 1),
        "x.lora_B.default.weight": torch.ones(1, 4),
    }
    # B A = 4, times alpha / sqrt(r) = 6 / 2.
    weights = merge_lora(state, LoraConfig(r=4, lora_alpha=6, use_rslora=True))
    assert weights["x.weight"].item() == 12


def test_merging_keeps_the_precision_and_leaves_the_original():
    weight = torch.full((2, 3), 10.0, dtype=torch.bfloat16)
    assert merged(weight)["x.weight"].dtype == torch.bfloat16
    assert weight.unique().item() == 10


def test_fresh_adapters_change_no_output(folder):
    model, value_model = causal(folder), critic(folder)
    with torch.no_grad():
        logits, values = model(**batch()).logits, value_model(**batch(), return_values=True)
        for one in (model, value_model):
            add_lora(one, lora())
        assert torch.equal(model(**batch()).logits, logits)
        assert torch.equal(value_model(**batch(), return_values=True), values)


NUM_LINEAR = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma"), 7),
    **dict.fromkeys(("opt", "opt_projected", "phi", "gptj"), 6),
    **dict.fromkeys(("gpt2", "gpt_neox", "bloom", "falcon"), 4),
    **dict.fromkeys(("mixtral", "qwen3_moe"), 4),  # the experts are stacked in tensors
}


@pytest.mark.slow
def test_every_linear_layer_of_the_backbone_gets_an_adapter_and_no_output_layer(folder):
    model, value_model = causal(folder), critic(folder)
    family = "opt_projected" if getattr(model.config, "word_embed_proj_dim", 32) == 16 else None
    expected = 2 * NUM_LINEAR[family or model.config.model_type] + (2 if family else 0)  # project_in, _out
    for one in (model, value_model):
        add_lora(one, lora())
        assert len(adapted(one)) == expected
        assert not [name for name in adapted(one) if name.startswith(("lm_head", "embed_out", "v_head"))]


@pytest.mark.parametrize(("alone", "fate"), [(True, "not trained"), (False, "trained whole")])
def test_that_experts_get_no_adapters_is_said(alone, fate, tmp_path, capsys):
    add_lora(causal(str(save_tiny_model(tmp_path / "moe", "mixtral"))), lora(), only_optimize_lora=alone)
    assert f"get no adapters; they are {fate}" in capsys.readouterr().out
    add_lora(causal(str(save_tiny_model(tmp_path / "dense", "mistral"))), lora(), only_optimize_lora=alone)
    assert "experts" not in capsys.readouterr().out


def test_alone_the_adapters_and_a_critics_head_are_trained(folder):
    model, value_model = causal(folder), critic(folder)
    for one in (model, value_model):
        add_lora(one, lora(), only_optimize_lora=True)
    adapters = {name for name, _ in model.named_parameters() if is_adapter(name)}
    assert trained(model) == adapters
    adapters = {name for name, _ in value_model.named_parameters() if is_adapter(name)}
    assert trained(value_model) == adapters | {"v_head.weight"}


def test_otherwise_all_but_the_covered_weights_is_trained(folder):
    model, value_model = causal(folder), critic(folder)
    for one in (model, value_model):
        before = trained(one)
        add_lora(one, lora())
        frozen = {name for name, p in one.named_parameters() if not p.requires_grad}
        assert frozen == {f"{name}.base_layer.weight" for name in adapted(one)}
        renamed = {
            name.replace(".base_layer.", ".") for name in trained(one) | frozen if not is_adapter(name)
        }
        assert renamed == before


@pytest.mark.parametrize(
    ("module_name", "kinds"),
    [
        ("decoder.layers.", {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
        ("q_proj, project_in", {"q_proj", "project_in"}),
    ],
)
def test_adapters_go_where_a_part_of_the_name_fits(module_name, kinds, opt_projected):
    for model in (causal(opt_projected), critic(opt_projected)):
        add_lora(model, lora(lora_module_name=module_name))
        assert {name.split(".")[-1] for name in adapted(model)} == kinds


@pytest.mark.parametrize("module_name", ["decoder.blocks.", "q_proj,qkv", "embed_tokens"])
def test_a_part_that_no_name_has_is_an_error_that_lists_the_names(module_name, opt_projected):
    with pytest.raises(UserError) as error:
        add_lora(causal(opt_projected), lora(lora_module_name=module_name, prefix="actor_"))
    part = module_name.split(",")[-1]
    for piece in (
        f"--actor_lora_module_name {part!r}",
        "model.decoder.layers.*.self_attn.q_proj",
        "project_in",
    ):
        assert piece in str(error.value)


def test_alpha_is_the_rank_unless_given(opt_projected):
    for settings, scaling in (({}, 1), ({"lora_alpha": 1}, 0.25), ({"lora_dim": 8, "lora_alpha": 4}, 0.5)):
        model = causal(opt_projected)
        add_lora(model, lora(**settings))
        layer = model.model.decoder.layers[0].fc1
        torch.nn.init.ones_(layer.lora_A["default"].weight)
        torch.nn.init.ones_(layer.lora_B["default"].weight)
        x = torch.ones(1, 32)
        # Each of r rows of A sums 32 ones, and B sums those r.
        expected = scaling * 32 * layer.lora_A["default"].out_features
        torch.testing.assert_close(layer(x) - layer.base_layer(x), torch.full((1, 64), float(expected)))


@pytest.mark.slow
def test_adapters_follow_torchs_seed_and_nothing_else(opt_projected):
    def first_a(seed: int, dtype: str | None = None) -> Tensor:
        torch.manual_seed(seed)
        torch.rand(seed)  # what was drawn in between does not matter
        model = causal(opt_projected, ds_config={dtype: {"enabled": True}} if dtype else None)
        state = torch.get_rng_state()
        add_lora(model, lora())
        assert torch.equal(torch.get_rng_state(), state)
        return model.model.decoder.layers[0].fc1.lora_A["default"].weight

    assert torch.equal(first_a(1), first_a(1))
    assert torch.equal(first_a(1).bfloat16(), first_a(1, "bf16"))
    assert not torch.equal(first_a(1), first_a(2))


@pytest.mark.slow
@pytest.mark.parametrize("make", [causal, critic])
def test_gradient_checkpointing_gives_frozen_backbones_the_same_gradients(make, folder):
    def gradients(*, checkpointing: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = make(folder)
        add_lora(model, lora(), only_optimize_lora=True)
        if checkpointing:
            enable_gradient_checkpointing(model)
        model.train()
        extra = {} if make is causal else {"return_values": True}
        output = model(**batch(), use_cache=False, **extra)
        (output if make is critic else output.logits).pow(2).mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, recomputed = gradients(checkpointing=False), gradients(checkpointing=True)
    assert plain.keys() == recomputed.keys()
    assert sum(".lora_B." in name and bool(grad.any()) for name, grad in plain.items()) > 0
    torch.testing.assert_close(recomputed, plain)


def from_file(folder: Path, **content) -> ModelArguments:
    path = folder / "lora.json"
    path.write_text(json.dumps(content))
    return lora(lora_dim=0, lora_config=str(path))


OPT_LAYERS = {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}


@pytest.mark.parametrize(
    ("content", "kinds", "number"),
    [
        ({}, {*OPT_LAYERS, "project_in", "project_out"}, 14),
        ({"target_modules": "ALL-linear"}, {*OPT_LAYERS, "project_in", "project_out"}, 14),
        ({"target_modules": ["fc1", "layers.1.fc2"]}, {"fc1", "fc2"}, 3),
        ({"target_modules": r".*\.layers\.\d+\.fc."}, {"fc1", "fc2"}, 4),
        ({"target_modules": ["fc1"], "layers_to_transform": 1}, {"fc1"}, 1),
        ({"exclude_modules": ["project_in", "project_out"]}, OPT_LAYERS, 12),
        ({"target_modules": ["model.decoder.layers.0.fc1"]}, {"fc1"}, 1),
    ],
)
def test_a_file_chooses_layers_as_peft_does_in_either_model(content, kinds, number, opt_projected, tmp_path):
    for model in (causal(opt_projected), critic(opt_projected)):
        add_lora(model, from_file(tmp_path, **content))
        assert {name.split(".")[-1] for name in adapted(model)} == kinds
        assert len(adapted(model)) == number


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"target_modules": ["fc1", "lm_head"]}, "target_modules: 'lm_head' is no linear layer"),
        ({"target_modules": ".*nothing"}, "leave no linear layer"),
        ({"target_modules": ["fc1"], "exclude_modules": ["fc1"]}, "leave no linear layer"),
        ({"target_modules": "(fc1"}, "no regular expression"),
    ],
)
def test_a_file_that_covers_no_layer_is_an_error(content, part, opt_projected, tmp_path):
    with pytest.raises(UserError) as error:
        add_lora(causal(opt_projected), from_file(tmp_path, **content))
    assert "--lora_config" in str(error.value)
    assert part in str(error.value)
    assert "model.decoder.layers.*.fc1" in str(error.value) or "regular" in part


def test_rank_and_scale_of_a_file_reach_the_layers(opt_projected, tmp_path):
    model = causal(opt_projected)
    add_lora(model, from_file(tmp_path, r=16, lora_alpha=8, use_rslora=True, init_lora_weights="gaussian"))
    layer = model.model.decoder.layers[0].fc1
    assert (layer.r["default"], layer.scaling["default"]) == (16, 2)
    assert layer.lora_B["default"].weight.abs().max() == 0


@pytest.mark.parametrize(
    ("bias", "names"), [("none", set()), ("lora_only", {"fc1.base_layer.bias"}), ("all", {"bias"})]
)
def test_biases_are_trained_as_the_file_says(bias, names, opt_projected, tmp_path):
    model = causal(opt_projected)
    args = from_file(tmp_path, target_modules=["fc1"], bias=bias)
    add_lora(model, args, only_optimize_lora=True)
    biases = {name for name in trained(model) if not is_adapter(name)}
    expected = {n for n, _ in model.named_parameters() if n.endswith(".bias") and n.endswith(tuple(names))}
    assert biases == expected
    assert bool(expected) is bool(names)
    assert trains_adapters_only(model) is (bias == "none")
    assert will_train_adapters_only(args, only_optimize_lora=True) is (bias == "none")
    assert not will_train_adapters_only(args, only_optimize_lora=False)


@pytest.fixture
def without_weights(opt_projected, tmp_path) -> str:
    """The configuration of a model, and no weights to be read."""
    (tmp_path / "config.json").write_text((Path(opt_projected) / "config.json").read_text())
    return str(tmp_path)


def test_layers_are_checked_before_weights_are_read(without_weights):
    one = {"model_name_or_path": without_weights, "lora_dim": 4, "prefix": "critic_"}
    fitting = ModelArguments(**one, lora_module_name="decoder.layers.")
    check_adapters(language=fitting, reward=fitting)
    wrong = ModelArguments(**one, lora_module_name="qkv")
    for models, name in (
        ({"language": wrong}, "model.decoder"),
        ({"reward": wrong}, "rwtransformer.decoder"),
    ):
        with pytest.raises(UserError, match="--critic_lora_module_name 'qkv'") as error:
            check_adapters(**models)
        assert f"{name}.layers.*.self_attn.q_proj" in str(error.value)


def test_a_model_without_adapters_is_not_looked_at():
    check_adapters(language=ModelArguments(model_name_or_path="gone"))


def test_adapters_off_is_the_model_that_was_loaded_and_changes_no_flag(folder):
    model = causal(folder)
    with torch.no_grad():
        loaded = model(**batch()).logits
        add_lora(model, lora(), only_optimize_lora=True)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
        flags, adapted_logits = trained(model), model(**batch()).logits
        assert (adapted_logits - loaded).abs().max() > 0.01
        with adapters_off(model):
            assert torch.equal(model(**batch()).logits, loaded)
            assert trained(model) == flags
        assert torch.equal(model(**batch()).logits, adapted_logits)
        with pytest.raises(RuntimeError, match="midway"), adapters_off(model):
            raise RuntimeError("midway")
        assert torch.equal(model(**batch()).logits, adapted_logits)
    assert trained(model) == flags


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_adapters_give_the_same_outputs_and_leave_every_bit_as_it_was(folder, dtype):
    torch.manual_seed(0)
    model = causal(folder).to(dtype)
    add_lora(model, lora())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
        before = {name: p.clone() for name, p in model.named_parameters()}
        expected = model(**batch()).logits
        with adapters_fused(model):
            fused = model(**batch()).logits
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        # Rounding in bf16 may choose another expert where two have nearly the same logit.
        if dtype == torch.float32 or not hasattr(model.config, "num_experts"):
            torch.testing.assert_close(fused, expected, atol=tolerance, rtol=tolerance)
        assert torch.equal(model(**batch()).logits, expected)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_model_without_adapters_has_none_to_fuse(opt_projected):
    with adapters_fused(causal(opt_projected)):
        pass
