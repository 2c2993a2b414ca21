"""Export: what transformers loads is what was trained, from every ZeRO stage."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from processes import python
from safetensors.torch import load_file
from tiny import FAMILIES, TEXTS, save_tiny_model, tiny_tokenizer, with_moved_adapters
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dschat.arguments import ModelArguments
from dschat.errors import UserError
from dschat.export.export import export_model
from dschat.models.loading import create_critic_model, create_hf_model
from dschat.models.lora import add_lora, check_adapters

WORKER = Path(__file__).resolve().parents[1] / "workers" / "models_at_stage.py"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reward_model_scores_alike_in_transformers(family, tmp_path):
    tokenizer = tiny_tokenizer()
    base = save_tiny_model(tmp_path / "base", family)
    critic = create_critic_model(str(base), tokenizer, None)
    export_model(critic, tokenizer, tmp_path / "reward")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "reward")(
        [text + tokenizer.eos_token for text in TEXTS],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    batch = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        ours = critic.forward_value(**batch)["chosen_end_scores"]
        theirs = classifier(**batch).logits.squeeze(-1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert ours.std() > 0.01
    config = json.loads((tmp_path / "reward" / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification")
    assert len(config["id2label"]) == 1
    assert config["pad_token_id"] == tokenizer.pad_token_id
    assert config.get("problem_type") is None
    assert config["use_cache"] is True


@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_model_comes_back_and_generates(family, tmp_path):
    tokenizer = tiny_tokenizer()
    base = save_tiny_model(tmp_path / "base", family)
    model = create_hf_model(AutoModelForCausalLM, str(base), tokenizer)
    export_model(model, tokenizer, str(tmp_path / "actor"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "actor")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "actor")(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.generate(tokens, max_new_tokens=2, eos_token_id=None).shape[1] == tokens.shape[1] + 2
    assert model.config.use_cache is False


def test_an_export_replaces_an_older_one_and_nothing_else(tmp_path):
    tokenizer = tiny_tokenizer()
    model = create_hf_model(AutoModelForCausalLM, str(save_tiny_model(tmp_path / "base")), tokenizer)
    output = tmp_path / "output"
    output.mkdir()
    (output / "metrics.jsonl").write_text("{}")
    export_model(model, tokenizer, output)
    export_model(model, tokenizer, output)
    assert sorted(path.name for path in output.iterdir()) == [
        ".export.json",
        "config.json",
        "generation_config.json",
        "metrics.jsonl",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_weights_and_files_of_others_are_set_aside_and_said(tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    model = create_hf_model(AutoModelForCausalLM, str(save_tiny_model(tmp_path / "base")), tokenizer)
    output, others = tmp_path / "output", ("model.safetensors.index.json", "pytorch_model.bin", "config.json")
    output.mkdir()
    for number in (1, 2):
        for name in others:
            (output / name).write_text(f"someone's {number}")
        (output / ".export.json").unlink(missing_ok=True)
        export_model(model, tokenizer, output)
        AutoModelForCausalLM.from_pretrained(output)
    assert (
        "config.json is no file of this run; it is kept as set-aside-config.json" in capsys.readouterr().out
    )
    for name in others:
        assert (output / f"set-aside-{name}").read_text() == "someone's 1"
        assert (output / f"set-aside-set-aside-{name}").read_text() == "someone's 2"


def test_a_failed_export_leaves_the_older_one(tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    model = create_hf_model(AutoModelForCausalLM, str(save_tiny_model(tmp_path / "base")), tokenizer)
    export_model(model, tokenizer, tmp_path / "output")
    before = {path.name: path.read_bytes() for path in (tmp_path / "output").iterdir()}

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(UserError, match=r"could not be written to .*: rank 0: no space left on device"):
        export_model(model, tokenizer, tmp_path / "output")
    assert {path.name: path.read_bytes() for path in (tmp_path / "output").iterdir()} == before


def test_given_parameters_take_the_place_of_the_models(tmp_path):
    tokenizer = tiny_tokenizer()
    base = str(save_tiny_model(tmp_path / "base", "opt"))
    model = create_hf_model(AutoModelForCausalLM, base, tokenizer, {"bf16": {"enabled": True}})
    average = {name: torch.full_like(p, 0.5, dtype=torch.float32) for name, p in model.named_parameters()}
    export_model(model, tokenizer, tmp_path / "ema", parameters=average)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ema")
    assert {p.unique().item() for p in loaded.parameters()} == {0.5}
    assert loaded.dtype == torch.bfloat16
    assert model.lm_head.weight.unique().numel() > 1


def test_a_parameter_that_the_model_does_not_have_is_a_mistake(tmp_path):
    tokenizer = tiny_tokenizer()
    model = create_hf_model(AutoModelForCausalLM, str(save_tiny_model(tmp_path / "base")), tokenizer)
    with pytest.raises(AssertionError, match="nonsense"):
        export_model(model, tokenizer, tmp_path / "out", parameters={"nonsense": torch.ones(1)})


def with_trained_adapters(model, **settings):
    """Adapters as after some training: B is no longer 0."""
    args = ModelArguments(**{"model_name_or_path": "base", "lora_dim": 4, "lora_alpha": 8, **settings})
    add_lora(model, args, only_optimize_lora=True)
    return with_moved_adapters(model)


def language_batch(tokenizer) -> dict[str, torch.Tensor]:
    tokens = tokenizer(list(TEXTS), padding=True, padding_side="right", return_tensors="pt")
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapted_actor_loads_merged_and_as_an_adapter_with_the_same_logits(family, tmp_path):
    tokenizer, base = tiny_tokenizer(), save_tiny_model(tmp_path / "base", family)
    plain = create_hf_model(AutoModelForCausalLM, str(base), tokenizer)
    batch = language_batch(tokenizer)
    with torch.no_grad():
        untrained = plain(**batch).logits
        model = with_trained_adapters(plain)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        export_model(model, tokenizer, tmp_path / "actor")
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
        live = model(**batch).logits
        merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "actor", output_loading_info=True)
        assert not any(info[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        torch.testing.assert_close(merged(**batch).logits, live, atol=1e-5, rtol=0)
        original = AutoModelForCausalLM.from_pretrained(base)
        adapted = PeftModel.from_pretrained(original, tmp_path / "actor" / "adapter")
        torch.testing.assert_close(adapted(**batch).logits, live, atol=1e-5, rtol=0)
    assert (live - untrained).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapted_reward_model_loads_merged_and_as_an_adapter_with_the_same_scores(family, tmp_path):
    tokenizer, base = tiny_tokenizer(), save_tiny_model(tmp_path / "base", family)
    critic = with_trained_adapters(create_critic_model(str(base), tokenizer, None))
    export_model(critic, tokenizer, tmp_path / "reward")
    batch = language_batch(tokenizer)
    original = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    original.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        live = critic.forward_value(**batch)["chosen_end_scores"]
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
        torch.testing.assert_close(merged(**batch).logits.squeeze(-1), live, atol=1e-5, rtol=0)
        adapted = PeftModel.from_pretrained(original, tmp_path / "reward" / "adapter")
        torch.testing.assert_close(adapted(**batch).logits.squeeze(-1), live, atol=1e-5, rtol=0)
        again = create_critic_model(str(tmp_path / "reward"), tokenizer, None, rlhf_training=True)
        again_scores = again.forward_value(**batch)["chosen_end_scores"]
        torch.testing.assert_close(again_scores, live, atol=1e-5, rtol=0)


def test_averaged_adapters_are_merged_in_place_of_the_live_ones(tmp_path):
    tokenizer, base = tiny_tokenizer(), save_tiny_model(tmp_path / "base")
    model = create_hf_model(AutoModelForCausalLM, str(base), tokenizer)
    with_trained_adapters(model, lora_module_name="layers.1.mlp.down_proj")  # [32, 64]
    layer = "model.layers.1.mlp.down_proj"
    average = {
        f"{layer}.lora_A.default.weight": torch.full((4, 64), 0.5),
        f"{layer}.lora_B.default.weight": torch.full((32, 4), 0.25),
    }
    export_model(model, tokenizer, tmp_path / "ema", parameters=average)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "ema").state_dict()
    original = AutoModelForCausalLM.from_pretrained(base).state_dict()
    changed = {name for name in merged if not torch.equal(merged[name], original[name])}
    assert changed == {f"{layer}.weight"}
    # alpha / r = 8 / 4, and B A sums 4 products of 0.25 * 0.5: 2 * 0.5.
    update = merged[f"{layer}.weight"] - original[f"{layer}.weight"]
    torch.testing.assert_close(update, torch.ones(32, 64))
    written = load_file(tmp_path / "ema" / "adapter" / "adapter_model.safetensors")
    assert {name: tensor.unique().item() for name, tensor in written.items()} == {
        f"base_model.model.{layer}.lora_A.weight": 0.5,
        f"base_model.model.{layer}.lora_B.weight": 0.25,
    }


@pytest.mark.slow
@pytest.mark.parametrize("alone", [True, False])
def test_an_adapter_that_is_not_all_that_was_trained_is_said(alone, tmp_path, capsys):
    tokenizer, base = tiny_tokenizer(), str(save_tiny_model(tmp_path / "base"))
    model = create_critic_model(base, tokenizer, None)
    add_lora(model, ModelArguments(model_name_or_path=base, lora_dim=4), only_optimize_lora=alone)
    export_model(model, tokenizer, tmp_path / "output")
    assert ("adapter/ holds the adapters alone" in capsys.readouterr().out) is not alone


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("is_reward_model", [False, True], ids=["actor", "reward"])
def test_adapters_of_a_file_are_exported_with_their_scale_and_biases(bias, is_reward_model, tmp_path, capsys):
    tokenizer, base = tiny_tokenizer(), save_tiny_model(tmp_path / "base", "opt")
    file = tmp_path / "lora.json"
    file.write_text(json.dumps({"r": 4, "lora_alpha": 8, "use_rslora": True, "bias": bias}))
    args = ModelArguments(model_name_or_path=str(base), lora_config=str(file))
    auto_class = AutoModelForSequenceClassification if is_reward_model else AutoModelForCausalLM
    if is_reward_model:
        model = create_critic_model(str(base), tokenizer, None)
        original = auto_class.from_pretrained(base, num_labels=1)
        original.config.pad_token_id = tokenizer.pad_token_id
    else:
        model, original = create_hf_model(auto_class, str(base), tokenizer), auto_class.from_pretrained(base)
    add_lora(model, args, only_optimize_lora=True)
    batch = language_batch(tokenizer)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        export_model(model, tokenizer, tmp_path / "out")
        expected = (
            model.forward_value(**batch)["chosen_end_scores"] if is_reward_model else model(**batch).logits
        )
        for loaded in (
            auto_class.from_pretrained(tmp_path / "out"),
            PeftModel.from_pretrained(original, tmp_path / "out" / "adapter"),
        ):
            actual = loaded(**batch).logits
            torch.testing.assert_close(actual.view_as(expected), expected, atol=1e-5, rtol=0)
    assert "adapter/ holds the adapters alone" not in capsys.readouterr().out
    again = ModelArguments(
        model_name_or_path=str(base), lora_config=str(tmp_path / "out" / "adapter" / "adapter_config.json")
    )
    check_adapters(language=again, reward=again)


def test_a_later_export_replaces_or_removes_the_adapter(tmp_path):
    tokenizer, base = tiny_tokenizer(), str(save_tiny_model(tmp_path / "base"))
    model = with_trained_adapters(create_hf_model(AutoModelForCausalLM, base, tokenizer))
    for _ in range(2):
        export_model(model, tokenizer, tmp_path / "output")
        assert sorted(path.name for path in (tmp_path / "output" / "adapter").iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
    export_model(create_hf_model(AutoModelForCausalLM, base, tokenizer), tokenizer, tmp_path / "output")
    assert not (tmp_path / "output" / "adapter").exists()


def run_worker(model: Path, output: Path, *, stage: int, dtype: str, ranks: int) -> dict:
    output.mkdir()
    python(WORKER, model, output, stage, dtype, ranks=ranks)
    return json.loads((output / "seen.json").read_text())


@pytest.fixture(scope="module")
def without_padding_token(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    return save_tiny_model(folder, "qwen3", tokenizer=tiny_tokenizer(pad_token=None))


@pytest.mark.slow
def test_zero_3_on_two_ranks_trains_and_exports_what_one_process_does(without_padding_token, tmp_path):
    one = run_worker(without_padding_token, tmp_path / "one", stage=0, dtype="fp32", ranks=1)
    two = run_worker(without_padding_token, tmp_path / "two", stage=3, dtype="fp32", ranks=2)
    assert one["sharded"] == 0
    assert two["sharded"] > 0
    assert one["plain_is_whole"]
    assert two["plain_is_whole"]
    old = len(tiny_tokenizer(pad_token=None))
    assert one["vocabulary"] == two["vocabulary"] == [old + 1] * 3
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-4)
    assert sorted(two["scores"]) == pytest.approx(sorted(one["scores"]), abs=1e-4)
    assert one["reload_error"] == pytest.approx(0, abs=1e-5)
    assert two["reload_error"] == pytest.approx(0, abs=1e-5)
    assert (one["refusals"], two["refusals"]) == (1, 2)
    for name, auto_class in (("actor", AutoModelForCausalLM), ("critic", AutoModelForSequenceClassification)):
        ours = auto_class.from_pretrained(tmp_path / "one" / name).state_dict()
        theirs = auto_class.from_pretrained(tmp_path / "two" / name).state_dict()
        torch.testing.assert_close(ours, theirs, atol=1e-3 if name == "critic" else 0, rtol=0)


@pytest.mark.slow
def test_a_critic_trains_in_bf16_with_zero_2(without_padding_token, tmp_path):
    seen = run_worker(without_padding_token, tmp_path / "bf16", stage=2, dtype="bf16", ranks=2)
    assert seen["losses"][1] < seen["losses"][0]
    assert seen["losses"][3] < seen["losses"][2]
    assert seen["reload_error"] == 0
