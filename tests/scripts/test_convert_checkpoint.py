"""Conversion from DeepSpeed-Chat and back: the same tensors, and messages for what is no model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import python
from safetensors.torch import load_file
from tiny import save_reward_model, save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dschat.errors import UserError
from dschat.export.manifest import Manifest
from dschat.export.upstream import verify_model
from dschat.models.loading import create_critic_model
from scripts import convert_checkpoint

SCRIPT = Path(convert_checkpoint.__file__)
FAMILIES = ("llama", "opt", "gpt2")


def convert(source: str, *more: object) -> None:
    convert_checkpoint.convert(convert_checkpoint.parse(["--from", source, *map(str, more)]))


def their_weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)  # compares names and precisions too


def save_theirs(folder: Path, base: Path, *, backbone: str = "rwtransformer") -> dict[str, torch.Tensor]:
    """A reward model as DeepSpeed-Chat saves it in fp16, and its weights."""
    model = create_critic_model(str(base), tiny_tokenizer(), {"fp16": {"enabled": True}})
    state = {n.replace("rwtransformer", backbone): t for n, t in model.state_dict().items()}
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return state


@pytest.mark.parametrize("family", FAMILIES)
def test_our_reward_model_comes_back_the_same(family, tmp_path):
    ours = save_reward_model(save_tiny_model(tmp_path / "base", family), tmp_path / "ours")
    convert("dschat", ours, tmp_path / "theirs")
    theirs = their_weights(tmp_path / "theirs")
    assert theirs["v_head.weight"].shape == (1, 32)
    assert all(name.startswith(("rwtransformer.", "v_head.")) for name in theirs)
    convert("deepspeed-chat", tmp_path / "theirs", tmp_path / "back")
    assert_equal(load_file(tmp_path / "back" / "model.safetensors"), load_file(ours / "model.safetensors"))


@pytest.mark.parametrize("family", FAMILIES)
def test_our_language_model_comes_back_the_same(family, tmp_path):
    ours = save_tiny_model(tmp_path / "ours", family, dtype=torch.bfloat16)
    convert("dschat", ours, tmp_path / "theirs")
    # A tied output layer is in their file: theirs is what state_dict() gives.
    assert "lm_head.weight" in their_weights(tmp_path / "theirs")
    convert("deepspeed-chat", tmp_path / "theirs", tmp_path / "back")
    assert_equal(load_file(tmp_path / "back" / "model.safetensors"), load_file(ours / "model.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype="auto")
    assert_equal(model.state_dict(), their_weights(tmp_path / "theirs"))


@pytest.mark.parametrize("backbone", ["rwtransformer", "rwtranrsformer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_their_reward_model_comes_back_with_its_misspelling_corrected(family, backbone, tmp_path):
    base = save_tiny_model(tmp_path / "base", family)
    state = save_theirs(tmp_path / "theirs", base, backbone=backbone)
    convert("deepspeed-chat", tmp_path / "theirs", tmp_path / "ours")
    manifest = verify_model(str(tmp_path / "ours"), "--critic_model_name_or_path", "score").manifest
    assert (manifest.step, manifest.head, manifest.dtype) == ("deepspeed-chat", "score", "fp16")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    with torch.no_grad():
        row = torch.tensor(manifest.golden_inputs[:1])
        score = classifier(row, attention_mask=torch.ones_like(row)).logits.item()
    assert score == pytest.approx(manifest.golden_outputs[0], abs=0.01)
    convert("dschat", tmp_path / "ours", tmp_path / "back")
    expected = {name.replace(backbone, "rwtransformer"): tensor for name, tensor in state.items()}
    assert_equal(their_weights(tmp_path / "back"), expected)


def test_a_folder_in_use_is_left_alone_unless_told_otherwise(tmp_path):
    save_theirs(tmp_path / "theirs", save_tiny_model(tmp_path / "base"))
    output = tmp_path / "output"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    (output / "pytorch_model.bin").write_text("another model's")
    with pytest.raises(UserError, match=r"not empty.*--overwrite"):
        convert("deepspeed-chat", tmp_path / "theirs", output)
    convert("deepspeed-chat", tmp_path / "theirs", output, "--overwrite")
    assert (output / "notes.txt").read_text() == "mine"
    assert not (output / "pytorch_model.bin").exists()
    assert Manifest.read(output).step == "deepspeed-chat"


def test_what_is_no_such_model_is_an_error_that_says_so(tmp_path):
    ours = save_reward_model(save_tiny_model(tmp_path / "base"), tmp_path / "ours")
    with pytest.raises(UserError, match=r"no DeepSpeed-Chat model.*--from dschat"):
        convert("deepspeed-chat", ours, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no model of ours: config\.json"):
        convert("dschat", tmp_path / "empty", tmp_path / "out")
    with pytest.raises(UserError, match="is no folder"):
        convert("dschat", tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match="both"):
        convert("dschat", ours, ours)


def test_a_file_that_is_no_weights_and_a_head_without_its_backbone_are_errors(tmp_path):
    state = save_theirs(tmp_path / "theirs", save_tiny_model(tmp_path / "base"))
    weights = tmp_path / "theirs" / "pytorch_model.bin"
    torch.save({"module": Path("a class of its own")}, weights)
    with pytest.raises(UserError, match="weights alone"):
        convert("deepspeed-chat", tmp_path / "theirs", tmp_path / "out")
    torch.save({"step": 3}, weights)
    with pytest.raises(UserError, match="no named weights"):
        convert("deepspeed-chat", tmp_path / "theirs", tmp_path / "out")
    torch.save({name: t for name, t in state.items() if "layers.1." not in name}, weights)
    with pytest.raises(UserError, match=r"missing: .*layers\.1\."):
        convert("deepspeed-chat", tmp_path / "theirs", tmp_path / "out")


def save_trls(folder: Path, base: Path, bias: float, *, prefix: str = "") -> tuple[Any, torch.nn.Linear]:
    """A model with a value head, in a folder with the names that TRL gives its weights."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(3)
    head = torch.nn.Linear(32, 1)
    torch.nn.init.constant_(head.bias, bias)
    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {f"v_head.summary.{name}": tensor for name, tensor in head.state_dict().items()}
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    model.config.save_pretrained(folder)
    torch.save(state, folder / "pytorch_model.bin")
    return model, head


ROW = torch.tensor([[5, 80, 90, 11, 7, 60]])


def critic_values(folder: Path) -> torch.Tensor:
    """The values of a converted critic at every token of ROW."""
    critic = create_critic_model(str(folder), tiny_tokenizer(), None, rlhf_training=True).eval()
    with torch.no_grad():
        return critic.forward_value(ROW, return_value_only=True)


@pytest.mark.parametrize(("family", "prefix"), [("llama", ""), ("opt", "pretrained_model."), ("gpt2", "")])
def test_trls_model_with_a_value_head_becomes_an_actor_and_a_critic(family, prefix, tmp_path, capsys):
    base = save_tiny_model(tmp_path / "base", family)
    model, head = save_trls(tmp_path / "trl", base, 0.25, prefix=prefix)
    convert("trl-valuehead", tmp_path / "trl", tmp_path / "out")
    assert "the bias of the value head, 0.25, is left out" in capsys.readouterr().out
    actor = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "actor")
    with torch.no_grad():
        expected = model(ROW, output_hidden_states=True)
        torch.testing.assert_close(actor(ROW).logits, expected.logits)
        values = head(expected.hidden_states[-1]).squeeze(-1) - 0.25
    torch.testing.assert_close(critic_values(tmp_path / "out" / "critic"), values)
    for name, heads in {"actor": ("language_model",), "critic": ("value",)}.items():
        assert verify_model(str(tmp_path / "out" / name), "--flag", *heads).manifest.step == "trl-valuehead"


def test_a_folder_of_trls_own_class_gives_its_logits_and_values(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    ppo = pytest.importorskip("trl.experimental.ppo", reason="pip install trl==1.12 brings TRL's PPO")
    base = save_tiny_model(tmp_path / "base")
    torch.manual_seed(4)
    theirs = ppo.AutoModelForCausalLMWithValueHead.from_pretrained(str(base)).eval()
    theirs.save_pretrained(str(tmp_path / "trl"))
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "trl")
    convert("trl-valuehead", tmp_path / "trl", tmp_path / "out")
    actor = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "actor")
    with torch.no_grad():
        logits, _, values = theirs(ROW)
        torch.testing.assert_close(actor(ROW).logits, logits)
    torch.testing.assert_close(
        critic_values(tmp_path / "out" / "critic"), values - theirs.v_head.summary.bias.item()
    )


def test_what_is_no_value_head_model_is_an_error_that_says_so(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    with pytest.raises(UserError, match=r"no value head \(v_head\.summary\.weight\): it is a model as it is"):
        convert("trl-valuehead", base, tmp_path / "out")
    (tmp_path / "adapter").mkdir()
    with pytest.raises(UserError, match=r"no model\*\.safetensors and no pytorch_model\*\.bin"):
        convert("trl-valuehead", tmp_path / "adapter", tmp_path / "out")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds an adapter.*dschat merge-adapter"):
        convert("trl-valuehead", tmp_path / "adapter", tmp_path / "out")


def test_the_program_ends_in_one_message(tmp_path):
    result = python(SCRIPT, "--from=dschat", tmp_path / "nowhere", tmp_path / "out", check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: INPUT")
    assert "Traceback" not in result.stderr
