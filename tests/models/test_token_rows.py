"""Rows of new tokens under adapters: they alone of the vocabulary are trained, and exports have them."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from processes import ROOT, python
from safetensors.torch import load_file
from tiny import FAMILIES, save_tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dschat.arguments import ModelArguments, TokenizerArguments
from dschat.export.export import export_model
from dschat.models.loading import create_critic_model, create_hf_model
from dschat.models.lora import adapters_off, add_lora, trains_adapters_only, trains_more_than_adapters
from dschat.models.token_rows import new_rows_of
from dschat.models.tokenizer import load_tokenizer

STOP = TokenizerArguments(add_eot_token=True, eot_token="<|im_end|>")
ARGS = ModelArguments(model_name_or_path="base", lora_dim=2)


def adapted(folder: Path | str, maker=create_hf_model, **settings) -> tuple[nn.Module, object]:
    """A model and its tokenizer, which has one token more, with adapters."""
    tokenizer = load_tokenizer(str(folder), STOP)
    kind = (AutoModelForCausalLM,) if maker is create_hf_model else ()
    end = (None,) if maker is create_critic_model else ()
    model = maker(*kind, str(folder), tokenizer, *end)
    add_lora(model, ARGS, only_optimize_lora=settings.get("alone", True))
    return model, tokenizer


def rows(ids: list[int]) -> Tensor:
    return torch.tensor([ids])


def learn_to_stop(model: nn.Module, end: int, steps: int = 60) -> None:
    """After 5, 6, 7 comes the end, and 9 after that."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        logits = model(rows([5, 6, 7, end, 9])).logits
        nn.functional.cross_entropy(logits[0, :-1].float(), torch.tensor([6, 7, end, 9])).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_rows_change_no_output_and_take_gradients(family, tmp_path):
    save_tiny_model(tmp_path, family)
    tokenizer = load_tokenizer(str(tmp_path), STOP)
    ids = rows([5, tokenizer.eos_token_id, 7])
    before = create_hf_model(AutoModelForCausalLM, str(tmp_path), tokenizer)(ids).logits
    model, _ = adapted(tmp_path)
    after = model(ids).logits
    assert torch.equal(after, before)
    assert trains_adapters_only(model)
    assert not trains_more_than_adapters(model)
    after.float().logsumexp(-1).sum().backward()
    found = new_rows_of(model)
    assert len(found) == 2
    assert all(part.delta.grad.abs().sum() > 0 for part in found)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "opt_projected"])
def test_the_model_learns_to_stop_and_the_export_has_it(family, tmp_path):
    """Llama's output layer is its own here, the others' is the embedding; Gemma scales what it looks up."""
    base = load_file(save_tiny_model(tmp_path / "base", family) / "model.safetensors")
    model, tokenizer = adapted(tmp_path / "base")
    end = tokenizer.eos_token_id
    prompt = rows([5, 6, 7])
    assert model(prompt).logits[0, -1].argmax() != end
    learn_to_stop(model, end)
    live = model(rows([5, 6, 7, end, 9])).logits
    export_model(model, tokenizer, tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in state.items():
        if "new_rows" in name or (len(weight) == end + 1 and weight.dim() == 2):
            old = base[name]
            assert torch.equal(weight[:end], old), name
            assert (weight[end] - old.float().mean(dim=0)).abs().max() > 0.02, name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(loaded(rows([5, 6, 7, end, 9])).logits, live, atol=1e-4, rtol=1e-4)
    answer = loaded.generate(prompt, max_new_tokens=8, do_sample=False)
    assert answer[0, 3:].tolist() == [end]
    assert not [name for name in state if "new_rows" in name]
    # The adapter alone says the same, in PEFT, of the base model with the rows that it needs.
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    bare.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    peft = PeftModel.from_pretrained(bare, tmp_path / "out" / "adapter").eval()
    with torch.no_grad():
        if family == "llama":  # PEFT leaves the bias of an output layer out; these have none
            torch.testing.assert_close(peft(rows([5, 6, 7])).logits[..., :end], live[:, :3, :end], **CLOSE)
        torch.testing.assert_close(peft(rows([5, 6, 7])).logits[..., end], live[:, :3, end], **CLOSE)


CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def test_adapters_off_leaves_the_rows_as_they_were_loaded(tmp_path):
    save_tiny_model(tmp_path)
    model, tokenizer = adapted(tmp_path)
    ids = rows([5, 6, tokenizer.eos_token_id])
    before = model(ids).logits
    learn_to_stop(model, tokenizer.eos_token_id, steps=3)
    moved = model(ids).logits
    with adapters_off(model):
        assert torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, moved)
    assert not torch.equal(moved, before)


def test_a_reward_models_new_rows_are_trained_and_exported(tmp_path, capsys):
    save_tiny_model(tmp_path / "base")
    model, tokenizer = adapted(tmp_path / "base", create_critic_model)
    assert "rows of '<|im_end|>' are trained too" in capsys.readouterr().out
    end = tokenizer.eos_token_id
    ids = rows([5, 6, end])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(ids, return_values=True)[0, -1].backward()
        optimizer.step()
        optimizer.zero_grad()
    export_model(model.eval(), tokenizer, tmp_path / "out")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    score = model(ids, return_values=True)[0, -1]
    torch.testing.assert_close(loaded(ids).logits[0, 0], score, **CLOSE)
    settings = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert settings["trainable_token_indices"] == {"embed_tokens": [end]}


def test_a_token_that_finds_a_row_in_a_longer_vocabulary_is_new_too(tmp_path, capsys):
    save_tiny_model(tmp_path, vocab_size=500)
    model, tokenizer = adapted(tmp_path)
    assert model.new_tokens == {tokenizer.eos_token_id: "<|im_end|>"}
    assert model.get_input_embeddings().num_embeddings == 500
    assert "'<|im_end|>'" in capsys.readouterr().out


def test_nothing_is_added_where_the_whole_vocabulary_is_trained_or_no_token_is_new(tmp_path):
    save_tiny_model(tmp_path)
    assert new_rows_of(adapted(tmp_path, alone=False)[0]) == []
    model = create_hf_model(AutoModelForCausalLM, str(tmp_path), tiny_tokenizer())
    add_lora(model, ARGS, only_optimize_lora=True)
    assert new_rows_of(model) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_run_at_stage_3_trains_the_rows_that_stage_0_does(family, tmp_path):
    base = load_file(save_tiny_model(tmp_path / "base", family) / "model.safetensors")
    data = tmp_path / "greet.jsonl"
    data.write_text(
        "".join(f'{{"prompt": "say {n}", "chosen": "yes {n}", "rejected": "no"}}\n' for n in range(8))
    )
    states = []
    for stage, ranks in ((0, 1), (3, 2)):
        result = python(
            *(ROOT / "step1_sft" / "main.py", "--model_name_or_path", tmp_path / "base", "--data_path", data),
            *("--data_output_path", tmp_path / "cache", "--output_dir", tmp_path / f"out{stage}"),
            *("--data_split", "1,0,0", "--dtype", "fp32", "--max_seq_len", "64", "--num_train_epochs", "4"),
            *("--per_device_train_batch_size", "2", "--zero_stage", stage, "--gradient_accumulation_steps"),
            *(2 // ranks, "--lora_dim", "2", "--lora_learning_rate", "1e-2", "--only_optimize_lora"),
            *("--add_eot_token", "--eot_token", "<|im_end|>"),
            ranks=ranks,
        )
        assert "rows of '<|im_end|>' are trained too" in result.stdout
        states.append(load_file(tmp_path / f"out{stage}" / "model.safetensors"))
    for name, weight in states[0].items():
        torch.testing.assert_close(states[1][name], weight, atol=2e-3, rtol=0)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(weight[:-1], base[name])
    # As the last token of every row the end is never read, only said.
    said = "lm_head.weight" if family == "llama" else "model.embed_tokens.weight"
    assert (states[0][said][-1] - base[said].mean(dim=0)).abs().max() > 0.02
