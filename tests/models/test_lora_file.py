"""The file of --lora_config: what passes, and what is refused by its key."""

import json
from pathlib import Path

import pytest
from peft import LoraConfig

from dschat.arguments import ModelArguments
from dschat.errors import UserError
from dschat.models.lora_file import read_lora_file


def write(folder: Path, content: object) -> str:
    path = folder / "lora.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def read(folder: Path, content: object, *, prefix: str = "") -> LoraConfig:
    path = write(folder, content)
    return read_lora_file(ModelArguments(model_name_or_path="m", lora_config=path, prefix=prefix))


def test_what_the_file_leaves_out_is_pefts_default_on_all_layers(tmp_path):
    config = read(tmp_path, {"r": 16, "use_rslora": True})
    assert (config.r, config.use_rslora, config.target_modules) == (16, True, "all-linear")
    assert (config.lora_alpha, config.bias) == (LoraConfig().lora_alpha, "none")


def test_a_file_that_peft_wrote_says_the_same_again(tmp_path):
    LoraConfig(
        r=3,
        lora_alpha=6,
        lora_dropout=0.25,
        target_modules=["q_proj", "fc1"],
        exclude_modules=["layers.1.fc1"],
        layers_to_transform=[0, 1],
        layers_pattern="layers",
        bias="lora_only",
        init_lora_weights="gaussian",
        task_type="SEQ_CLS",
        modules_to_save=["score"],
        inference_mode=True,
    ).save_pretrained(tmp_path)
    config = read(tmp_path, (tmp_path / "adapter_config.json").read_text())
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (3, 6, 0.25, "lora_only")
    assert (config.target_modules, config.exclude_modules) == ({"q_proj", "fc1"}, {"layers.1.fc1"})
    assert (config.layers_to_transform, config.layers_pattern) == ([0, 1], "layers")
    assert config.init_lora_weights == "gaussian"
    assert not config.inference_mode


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("{'r': 8}", ["not JSON", "line 1 column 2"]),
        ("[8]", ["no JSON object"]),
        ({"rank": 8}, ["'rank' is no key"]),
        ({"lora_aplha": 8}, ["'lora_aplha'", "did you mean 'lora_alpha'?"]),
        ({"peft_type": "IA3"}, ["peft_type", "'LORA'", "'IA3'"]),
        ({"r": 0}, ["r must be a whole number of at least 1", "got 0"]),
        ({"r": "8"}, ["r must be", "'8'"]),
        ({"lora_alpha": 0}, ["lora_alpha must be a positive number"]),
        ({"lora_alpha": float("inf")}, ["lora_alpha must be a positive number", "inf"]),
        ({"r": 10**30}, ["r must be a whole number of at least 1"]),
        ({"lora_dropout": 1}, ["lora_dropout must be a number in [0, 1)"]),
        ({"target_modules": []}, ["target_modules must be", "'all-linear'"]),
        ({"bias": "some"}, ["bias must be", "'lora_only'"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights must be", "'pissa'"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save must be", "lm_head"]),
        ({"use_dora": True}, ["use_dora True is not supported", "use_rslora"]),
        ({"rank_pattern": {"q_proj": 4}}, ["rank_pattern", "not supported"]),
        ({"alpha_pattern": {"q_proj": 4}}, ["alpha_pattern", "not supported"]),
        ({"lora_bias": True}, ["lora_bias", "not supported"]),
        ({"layers_to_transform": [0]}, ["layers_to_transform", "target_modules"]),
    ],
)
def test_what_is_not_supported_is_refused_by_its_key(content, parts, tmp_path):
    with pytest.raises(UserError) as error:
        read(tmp_path, content)
    for part in ("--lora_config", "lora.json", *parts):
        assert part in str(error.value)


def test_json_that_is_nested_too_deep_is_named(tmp_path):
    (tmp_path / "lora.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"lora\.json is not JSON that can be read"):
        read_lora_file(ModelArguments(model_name_or_path="m", lora_config=str(tmp_path / "lora.json")))


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"--critic_lora_config gone\.json cannot be read"):
        read_lora_file(ModelArguments(model_name_or_path="m", lora_config="gone.json", prefix="critic_"))


def test_dropout_is_refused_in_step_3_only(tmp_path):
    assert read(tmp_path, {"lora_dropout": 0.1}).lora_dropout == 0.1
    with pytest.raises(UserError, match=r"--actor_lora_config .* lora_dropout must be 0"):
        read(tmp_path, {"lora_dropout": 0.1}, prefix="actor_")
