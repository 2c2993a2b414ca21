"""An adapter's folder and its base make one model; what does not fit is named."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dschat.errors import UserError
from dschat.models.adapter_folder import merged_model

IDS = torch.tensor([[5, 6, 7, 8]])


def adapter_of(model, folder: Path, task_type: str) -> torch.Tensor:
    """PEFT's adapter with random weights in `folder`, and the outputs of the model under it."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type=task_type)
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(folder)
    return adapted(IDS).logits.detach()


@pytest.fixture
def base(tmp_path) -> Path:
    return save_tiny_model(tmp_path / "base")


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    adapter_of(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora", "CAUSAL_LM")
    return tmp_path / "lora"


def edit(adapter: Path, change) -> None:
    """Change the weights of an adapter."""
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_the_merged_model_computes_what_base_and_adapter_do(base, tmp_path):
    expected = adapter_of(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora", "CAUSAL_LM")
    model, tokenizer = merged_model(tmp_path / "lora")
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-4)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


def test_an_adapter_of_a_classifier_has_one_label(base, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model.config.pad_token_id = 1
    adapter_of(model, tmp_path / "lora", "SEQ_CLS")
    with pytest.raises(UserError, match="has 2 labels; a reward model has 1, the score"):
        merged_model(tmp_path / "lora")


def test_another_base_takes_the_place_of_the_one_that_is_named(adapter, base, tmp_path):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "/gone"}))
    with pytest.raises(UserError, match="--base_model names another"):
        merged_model(adapter)
    model, _ = merged_model(adapter, str(base))
    assert model(IDS).logits.shape[:2] == (1, 4)


def test_weights_that_are_missing_or_belong_nowhere_are_listed(adapter):
    edit(adapter, lambda weights: weights.pop(min(weights)))
    with pytest.raises(UserError, match=r"1 of its weights are missing and 0 belong nowhere \(.*lora_A"):
        merged_model(adapter)
    edit(adapter, lambda weights: weights.update({"base_model.model.other.lora_A.weight": torch.ones(2, 2)}))
    with pytest.raises(UserError, match="1 of its weights are missing and 1 belong nowhere"):
        merged_model(adapter)


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_a_configuration_that_is_none_is_named(text, adapter):
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=r"adapter_config\.json is no adapter's configuration"):
        merged_model(adapter)
