"""Code that comes with a model runs where --trust_remote_code allows it, and nowhere else."""

import json

import pytest
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM

from dschat.errors import UserError
from dschat.export.export import export_model
from dschat.models.loading import create_hf_model
from dschat.models.preflight import check_language_model
from dschat.models.remote_code import set_consent
from dschat.models.tokenizer import load_tokenizer

CODE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

(Path({folder!r}) / "it_ran").touch()


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "own"
    save_tiny_model(folder)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text(CODE.format(folder=str(tmp_path)))
    yield folder
    set_consent(False)


def test_without_the_flag_no_code_runs_and_nobody_is_asked(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    with pytest.raises(UserError, match=r"needs Python code of its own.*--trust_remote_code"):
        check_language_model(str(folder), "--model_name_or_path")
    assert not (folder.parent / "it_ran").exists()


def test_with_the_flag_it_is_said_and_the_model_goes_through_training_and_export(folder, capsys, tmp_path):
    set_consent(True)
    assert "runs with your rights" in capsys.readouterr().out
    check_language_model(str(folder), "--model_name_or_path")
    tokenizer = load_tokenizer(str(folder))
    model = create_hf_model(AutoModelForCausalLM, str(folder), tokenizer)
    assert type(model).__name__ == "OwnForCausalLM"
    export_model(model, tokenizer, tmp_path / "out")
    again = create_hf_model(AutoModelForCausalLM, str(tmp_path / "out"), tokenizer)
    assert type(again).__name__ == "OwnForCausalLM"
    assert (folder.parent / "it_ran").exists()
