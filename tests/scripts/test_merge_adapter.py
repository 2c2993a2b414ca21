"""An adapter's folder and its base become a whole model; the steps say so."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dschat.arguments import ModelArguments, TokenizerArguments
from dschat.errors import UserError
from dschat.export.export import export_model
from dschat.models.loading import create_critic_model, create_hf_model
from dschat.models.lora import add_lora
from dschat.models.model_folder import check_model_path
from dschat.models.preflight import check_language_model, check_reward_model
from dschat.models.tokenizer import load_tokenizer
from scripts.merge_adapter import main, parse

IDS = torch.tensor([[5, 6, 7, 8]])
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture
def base(tmp_path) -> Path:
    return save_tiny_model(tmp_path / "base")


def merge(adapter: Path, output: Path, *more: str) -> Path:
    main(parse([str(adapter), str(output), *more]))
    return output


def trained_by_peft(model, folder: Path, **settings) -> torch.Tensor:
    """PEFT's adapter with random weights in `folder`, and the logits of the model under it."""
    given = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(**{**given, **settings})).eval()
    adapted.save_pretrained(folder)
    return adapted(IDS).logits.detach()


@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True}, {"rank_pattern": {"q_proj": 4}, "use_rslora": True}]
)
def test_pefts_adapter_is_merged_into_the_base_that_it_names(settings, base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    expected = trained_by_peft(model, tmp_path / "lora", task_type="CAUSAL_LM", **settings)
    with pytest.raises(UserError, match=r"an adapter and no whole model.*dschat merge-adapter .*lora OUTPUT"):
        check_model_path(str(tmp_path / "lora"), "--model_name_or_path")
    output = merge(tmp_path / "lora", tmp_path / "out")
    check_language_model(str(output), "--model_name_or_path")
    merged = AutoModelForCausalLM.from_pretrained(output)
    torch.testing.assert_close(merged(IDS).logits, expected, **CLOSE)
    assert AutoTokenizer.from_pretrained(output).get_vocab() == tiny_tokenizer().get_vocab()


def test_a_reward_models_adapter_brings_its_head(base, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.pad_token_id = 1
    expected = trained_by_peft(model, tmp_path / "lora", task_type="SEQ_CLS")
    output = merge(tmp_path / "lora", tmp_path / "out")
    check_reward_model(str(output), "--critic_model_name_or_path")
    merged = AutoModelForSequenceClassification.from_pretrained(output)
    torch.testing.assert_close(merged(IDS).logits, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["language model", "reward model"])
def test_our_own_adapter_is_merged_with_its_new_tokens(kind, base, tmp_path):
    tokenizer = load_tokenizer(str(base), TokenizerArguments(add_eot_token=True, eot_token="<|im_end|>"))
    if kind == "language model":
        model = create_hf_model(AutoModelForCausalLM, str(base), tokenizer)
    else:
        model = create_critic_model(str(base), tokenizer, None)
    add_lora(model, ModelArguments(model_name_or_path=str(base), lora_dim=2), only_optimize_lora=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    export_model(model, tokenizer, tmp_path / "export")
    adapter = tmp_path / "export" / "adapter"
    with pytest.raises(UserError, match="export holds the model with it merged in: give that"):
        check_model_path(str(adapter), "--model_name_or_path")
    output = merge(adapter, tmp_path / "out")
    auto = AutoModelForCausalLM if kind == "language model" else AutoModelForSequenceClassification
    theirs, ours = (auto.from_pretrained(folder).state_dict() for folder in (output, tmp_path / "export"))
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, atol=1e-6, rtol=1e-5, msg=name)
    assert AutoTokenizer.from_pretrained(output).eos_token == "<|im_end|>"


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    trained_by_peft(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora", task_type="CAUSAL_LM")
    return tmp_path / "lora"


def problem_of(adapter: Path, *more: str) -> str:
    with pytest.raises(UserError) as error:
        merge(adapter, adapter.parent / "out", *more)
    assert not (adapter.parent / "out").exists()
    return str(error.value)


def settle(adapter: Path, **settings) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"base_model_name_or_path": None}, "names no base model; give it with --base_model"),
        ({"base_model_name_or_path": "/gone/base"}, "no such folder"),
        ({"peft_type": "PROMPT_TUNING"}, "weights cannot take that in"),
        ({"task_type": "TOKEN_CLS"}, "task_type is TOKEN_CLS"),
        ({"task_type": "SEQ_CLS"}, "has no score.weight, so it is no reward model's"),
    ],
)
def test_what_cannot_be_merged_is_said(settings, said, adapter):
    settle(adapter, **settings)
    assert said in problem_of(adapter)


def test_the_base_may_be_elsewhere_and_another_one_is_refused(adapter, base, tmp_path):
    shutil.move(base, tmp_path / "moved")
    assert "--base_model names another" in problem_of(adapter)
    wrong = save_tiny_model(tmp_path / "wrong", "opt")
    assert "does not fit" in problem_of(adapter, "--base_model", str(wrong))
    merge(adapter, tmp_path / "out", "--base_model", str(tmp_path / "moved"))


def test_an_adapter_without_weights_and_a_full_output_are_refused(adapter, tmp_path):
    (adapter / "adapter_model.safetensors").unlink()
    assert "no weights" in problem_of(adapter)
    with pytest.raises(UserError, match="is there already"):
        merge(adapter, tmp_path / "base")
