"""Folders that hold no whole model are told by what they hold instead."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny import save_tiny_model

from dschat.errors import UserError
from dschat.models.model_folder import check_model_path
from dschat.models.preflight import check_language_model


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = save_tiny_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    return folder


def problem_of(folder: Path | str) -> str:
    with pytest.raises(UserError) as error:
        check_model_path(str(folder), "--model_name_or_path")
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tea-Q4_K_M.gguf", "GGUF files, which llama.cpp runs"),
        ("model.onnx", "ONNX"),
        ("onnx/model.onnx", "ONNX"),
        ("tf_model.h5", "TensorFlow's weights"),
        ("flax_model.msgpack", "Flax's weights"),
        ("consolidated.00.pth", "form of the model's makers"),
        ("__0_0.distcp", "distributed checkpoint of torch"),
        ("global_step20/mp_rank_00_model_states.pt", "checkpoint of DeepSpeed"),
        ("model-00001-of-00002.safetensors", "shards without their index"),
        ("pytorch_model-00001-of-00002.bin", "shards without their index"),
    ],
)
@pytest.mark.parametrize("has_config", [True, False])
def test_what_is_there_instead_of_weights_is_named(name, kind, has_config, folder):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    if not has_config:
        (folder / "config.json").unlink()
    problem = problem_of(folder)
    assert "; it holds " in problem
    assert kind in problem


def test_a_file_is_no_folder_and_the_folder_above_is_told_of_the_one_below(folder):
    assert "is a file; give the folder" in problem_of(folder / "config.json")
    assert "give the folder inside that has one: model." in problem_of(folder.parent)


def test_an_index_of_shards_that_are_missing_lists_them(folder):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"x")
    assert "lacks 1 of the 2 weight files that model.safetensors.index.json names" in problem_of(folder)


def test_a_pointer_of_git_lfs_is_not_the_weights(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (folder / "model.safetensors").write_text(pointer)
    assert "is a pointer of git-lfs" in problem_of(folder)


@pytest.mark.parametrize(
    ("added", "removed", "said"),
    [
        ("v_head.summary.weight", None, "v_head is a value head, as TRL saves it"),
        (None, "lm_head.weight", "no layer that makes words, as embedding models have none"),
    ],
)
def test_weights_that_do_not_fit_say_what_they_may_be(added, removed, said, tmp_path):
    path = save_tiny_model(tmp_path) / "model.safetensors"
    state = load_file(path)
    if added:
        state[added] = state["model.norm.weight"].clone()
    state.pop(removed, None)
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=said):
        check_language_model(str(tmp_path), "--model_name_or_path")


@pytest.fixture
def base(tmp_path) -> Path:
    return save_tiny_model(tmp_path / "base", "llama")


def test_a_complete_folder_passes_and_a_hub_id_is_left_to_the_hub(base):
    check_model_path(str(base), "--model_name_or_path")
    check_model_path("facebook/opt-350m", "--model_name_or_path")
    check_model_path("gpt2", "--model_name_or_path")


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "../nowhere", "output/step1/model"])
def test_a_path_that_does_not_exist_is_an_error(path):
    with pytest.raises(UserError, match=r"--actor_model_name_or_path .* there is no such folder"):
        check_model_path(path, "--actor_model_name_or_path")


def test_one_slash_is_a_path_below_a_folder_that_is_here_and_a_hub_id_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_model_path("output/reward", "--critic_model_name_or_path")
    (tmp_path / "output").mkdir()
    with pytest.raises(UserError, match="'output/reward': there is no such folder"):
        check_model_path("output/reward", "--critic_model_name_or_path")


def test_a_folder_must_have_configuration_and_weights(base):
    (base / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"--model_name_or_path .* has no weights"):
        check_model_path(str(base), "--model_name_or_path")
    (base / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        check_model_path(str(base), "--model_name_or_path")
