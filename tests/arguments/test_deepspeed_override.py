"""--deepspeed_config_override: what it refuses by name, and that its key lists are DeepSpeed's."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from step_flags import assert_refused, rlhf

from dschat.arguments.deepspeed_override import FREE, OWNED


@pytest.fixture
def override(tmp_path):
    def write(content: object) -> str:
        path = tmp_path / "override.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return f"--deepspeed_config_override={path}"

    return write


def test_the_content_of_the_file_is_the_setting(override):
    content = {"wall_clock_breakdown": True, "zero_optimization": {"reduce_bucket_size": 1000}}
    content |= {"aio": {"block_size": 1}, "checkpoint": {"writer": {"type": "PYTHON"}}}
    args = rlhf(override(content))
    assert args.run.deepspeed_config_override == content
    assert args.description.groups["run"]["deepspeed_config_override"] == content
    assert args.description.settings["deepspeed_config_override"].at_resume == "same"


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"bf16": {"enabled": True}}, ["'bf16'", "--dtype decides"]),
        ({"train_batch_size": 8}, ["'train_batch_size'", "--per_device_training_batch_size"]),
        ({"zero_optimization": {"stage": 2}}, ["'zero_optimization.stage'", "--actor_zero_stage"]),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            ["'zero_optimization.offload_param.device'", "--offload decides"],
        ),
        ({"wall_clock_brakdown": True}, ["no setting 'wall_clock_brakdown'", "use 'wall_clock_breakdown'"]),
        ({"aio": {"block_siz": 1}}, ["no setting 'aio.block_siz'", "use 'aio.block_size'"]),
        ({"aio.block_size": 1}, ["no setting 'aio.block_size'"]),
        ({"checkpoint": {"use_local": True}}, ["no setting 'checkpoint.use_local'"]),
        ({"zero_optimization": True}, ["'zero_optimization' must be an object", "--zero_stage"]),
        ([1], ["holds a list"]),
        ("{", ["cannot be read as JSON"]),
    ],
)
def test_what_a_flag_decides_or_deepspeed_does_not_know_is_refused(override, content, parts):
    assert_refused([override(content)], ["--deepspeed_config_override", "override.json", *parts])


def test_a_missing_file_is_named():
    assert_refused(["--deepspeed_config_override", "nowhere.json"], ["nowhere.json cannot be read"])


def test_every_key_stands_in_deepspeeds_source():
    package = Path(find_spec("deepspeed").submodule_search_locations[0])
    folders = ("runtime", "monitor", "comm", "utils", "profiling", "autotuning", "datastates", "compile")
    source = "\n".join(
        file.read_text() for folder in folders for file in sorted((package / folder).rglob("*.py"))
    )
    # A key is a string, an attribute that a dictionary lists, or a field of a pydantic model.
    for path in (*FREE, *OWNED):
        name = path.rpartition(".")[2]
        assert re.search(rf"""["']{name}["']|^    {name}: """, source, re.MULTILINE), path
