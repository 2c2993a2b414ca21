"""What a run was asked to do, as files have it."""

import json
from dataclasses import MISSING

import pytest
from step_flags import MODEL, rlhf

from dschat.arguments import (
    SftArguments,
    parse_arguments,
    saved_settings,
    without_secrets,
)


def test_arguments_are_written_as_json(tmp_path):
    rlhf("--seed", "7").description.write(tmp_path / "arguments.json")
    written = json.loads((tmp_path / "arguments.json").read_text())
    assert written["run"]["seed"] == 7
    assert written["actor"]["model_name_or_path"] == "a"


def test_passwords_and_tokens_in_urls_are_in_no_file(tmp_path):
    url = "https://us:p@ss@host:80/score?key=token&b&c="
    args = rlhf("--reward_endpoint", "http://plain:1/a", url)
    assert args.rewards.reward_endpoint[1] == url  # which is what is asked
    args.description.write(tmp_path / "arguments.json")
    kept = ["http://plain:1/a", "https://***@host:80/score?key=***&***&c=***"]
    assert json.loads((tmp_path / "arguments.json").read_text())["rewards"]["reward_endpoint"] == kept
    # What checkpoints, comparisons at a resume and model cards take.
    assert args.description.settings["reward_endpoint"].value == kept
    assert args.description.changed_flags()["reward_endpoint"] == kept
    command = without_secrets(f"main.py --reward_endpoint={url} '{url}' --data_path a?b=c")
    assert command == f"main.py --reward_endpoint={kept[1]} '{kept[1]}' --data_path a?b=c"


def sft(*argv: str):
    return parse_arguments("sft", [*MODEL, *argv]).description


def test_a_setting_has_value_default_and_what_a_resumed_run_may_change():
    settings = rlhf("--actor_zero_stage=3").description.settings
    stage, path, epsilon = (
        settings[name] for name in ("actor_zero_stage", "actor_model_name_or_path", "adam_epsilon")
    )
    assert (stage.value, stage.default, stage.at_resume) == (3, 0, "same")
    assert (path.value, path.default, path.at_resume) == ("a", MISSING, "free")
    assert (epsilon.value, epsilon.default) == (1e-5, 1e-5)  # the default of step 3, not of the group
    assert settings["data_path"].default == ["Dahoas/rm-static"]
    assert "actor_prefix" not in settings  # a field of the group, and no flag


def test_changed_flags_are_those_with_another_value_and_required_ones():
    changed = sft("--seed=7", "--zero_stage=0", "--resume_from_checkpoint", "--output_dir=o").changed_flags()
    assert changed == {"model_name_or_path": "m", "output_dir": "o", "seed": 7}


def test_sizes_are_of_all_ranks_whatever_divides_them():
    # 4 rows x 3 micro-batches on 2 ranks, and 8 x 3 on 1: 24 rows an optimiser step.
    name = "--per_device_train_batch_size x --gradient_accumulation_steps"
    four = sft("--per_device_train_batch_size=4", "--gradient_accumulation_steps=3")
    eight = sft("--per_device_train_batch_size=8", "--gradient_accumulation_steps=3")
    assert four.batch_sizes == {name: 12}
    assert four.global_sizes(2) == eight.global_sizes(1) == {name: 24}


def test_step_3_has_the_sizes_of_its_rollouts_and_of_its_optimiser_steps():
    sizes = rlhf(
        *("--per_device_generation_batch_size=6", "--generation_batches=2"),
        *("--per_device_training_batch_size=3", "--gradient_accumulation_steps=2"),
    ).description.global_sizes(5)
    assert sizes == {
        "--per_device_generation_batch_size x --generation_batches": 60,
        "--per_device_training_batch_size x --gradient_accumulation_steps": 30,
    }


def test_what_was_written_is_read_as_settings_again(tmp_path):
    sft("--seed=7", "--data_path", "a", "b").write(tmp_path / "arguments.json")
    saved = json.loads((tmp_path / "arguments.json").read_text())
    del saved["batch"]["max_seq_len"], saved["sft"]  # as of a version that knew fewer flags
    settings = saved_settings(SftArguments, saved)
    assert (settings["seed"], settings["data_path"]) == (7, ["a", "b"])
    assert (settings["max_seq_len"], settings["train_on_prompt"]) == (512, False)
    assert list(settings) == list(sft().settings)


@pytest.mark.parametrize("step", ["sft", "reward", "dpo"])
def test_a_description_names_its_step(step):
    description = parse_arguments(step, [*MODEL, "--output_dir=o"]).description
    assert (description.step, description.run.output_dir) == (step, "o")
    assert description.data.data_path == ["Dahoas/rm-static"]
