"""--config FILE: flags from YAML and JSON, and from the arguments of an earlier run."""

import argparse
import json

import pytest

from dschat.arguments import ReadableParser, parse_arguments
from dschat.arguments.config_file import values_in, without_config
from dschat.errors import UserError

REWARD = ("--model_name_or_path", "m", "--data_path", "d")


def written(tmp_path, text, name="flags.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_flags_of_a_file_in_either_spelling_and_the_command_line_wins(tmp_path):
    file = written(
        tmp_path,
        "model_name_or_path: m\ndata-path: [a.jsonl:0.3, b.jsonl]\nlearning_rate: 1e-4\nseed: 7\n"
        "gradient_checkpointing: yes\nsave_minutes:\neval_iters: 3\noutput_dir: '-o'\n"
        "enable_tensorboard: false\n",
    )
    args = parse_arguments("reward", ["--config", file, "--seed", "8"])
    assert args.data.data_path == ["a.jsonl:0.3", "b.jsonl"]
    assert (args.model.learning_rate, args.run.seed, args.batch.eval_iters) == (1e-4, 8, 3)
    assert args.model.gradient_checkpointing is True
    assert args.run.enable_tensorboard is False
    assert (args.run.save_minutes, args.run.output_dir) == (0, "-o")


@pytest.mark.parametrize("step", ["sft", "reward", "dpo", "rlhf"])
def test_the_arguments_of_a_run_are_such_a_file(tmp_path, step):
    flags = {
        "rlhf": [
            "--actor_model_name_or_path=a",
            "--critic_model_name_or_path=c",
            "--max_kl=inf",
            "--actor_lora_dim=4",
        ],
    }.get(step, ["--model_name_or_path=m", "--lora_dim=4"])
    run = parse_arguments(
        step, [*flags, "--data_path=d", "--warmup_ratio=0.1", f"--output_dir={tmp_path / 'a'}"]
    )
    run.description.write(tmp_path / "arguments.json")
    again = parse_arguments(step, ["--config", str(tmp_path / "arguments.json")])
    assert again == run


def test_how_a_run_was_started_is_not_taken_from_its_arguments(tmp_path):
    out = ["--output_dir", str(tmp_path)]
    run = parse_arguments("reward", [*REWARD, *out, "--overwrite_output_dir", "--local_rank=1"])
    run.description.write(tmp_path / "arguments.json")
    again = parse_arguments("reward", ["--config", str(tmp_path / "arguments.json")]).run
    assert (again.overwrite_output_dir, again.local_rank) == (False, -1)


def test_a_flag_replaces_the_one_in_the_file_that_excludes_it(tmp_path):
    file = written(tmp_path, "num_warmup_steps: 5\n")
    args = parse_arguments("reward", [*REWARD, "--config", file, "--warmup_ratio", "0.1"])
    assert (args.optimizer.num_warmup_steps, args.optimizer.warmup_ratio) == (0, 0.1)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lerning_rate: 1", ["unknown flag lerning_rate (did you mean --learning_rate?)"]),
        ("batch_size: 1", ["unknown flag batch_size", "--per_device_train_batch_size"]),
        ("learning_rate: much", ["argument --learning_rate", "invalid float value: 'much'"]),
        ("- learning_rate", ["must hold a mapping of flags to values, not a list"]),
        ("seed: 1\nseed: 2", ["line 2: seed is given twice"]),
        ("seed: [1", ["cannot be read as YAML or JSON"]),
        ("speed: {seed: 1}", ["speed holds a mapping, and no group of flags is called so (there are data,"]),
        ("learning_rate: [1, 2]", ["learning_rate takes one value, got [1, 2]"]),
        ("config: other.yaml", ["unknown flag config"]),
        ("run: {seed: {a: 1}}", ["seed must be a word, a number or a list of them"]),
        ("data_path: https://***@host/d", ["password or token in data_path was not kept; give --data_path"]),
    ],
)
def test_a_file_that_cannot_work_is_named_with_the_flag(tmp_path, text, parts):
    file = written(tmp_path, text)
    with pytest.raises(UserError) as error:
        parse_arguments("reward", ["--model_name_or_path=m", "--config", file])
    for part in [f"--config {file}", *parts]:
        assert part in str(error.value)


def test_no_file_no_second_file_and_none_that_is_not_there(tmp_path):
    for words, problem in (
        (["--config"], "--config needs a YAML or JSON file"),
        (["--config", "--seed"], "--config needs a YAML or JSON file"),
        (["--config=a", "--config", "b"], "--config is given 2 times"),
        (["--config=missing.yaml"], "cannot be read as YAML or JSON: [Errno 2]"),
    ):
        with pytest.raises(UserError) as error:
            parse_arguments("reward", [*REWARD, *words])
        assert problem in str(error.value)
    assert without_config(["--a", "--", "--config"])[0] == ["--a", "--", "--config"]


def test_a_flag_that_is_given_again_for_each_value_takes_a_list(tmp_path):
    parser = ReadableParser()
    parser.add_argument("--model", action="append")
    file = written(tmp_path, "model: [a=-x, b=y]")
    assert parser.parse_args(["--config", file]).model == ["a=-x", "b=y"]


def test_a_switch_of_a_tool_is_there_or_not(tmp_path):
    parser = ReadableParser()
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--num-shown", type=int, default=1)
    path = tmp_path / "tool.json"
    for given, expected in ((True, True), (False, False)):
        path.write_text(json.dumps({"greedy": given, "num_shown": 3}))
        found = parser.parse_args(["--config", str(path)])
        assert found == argparse.Namespace(greedy=expected, num_shown=3)
    path.write_text(json.dumps({"greedy": "often"}))
    with pytest.raises(UserError, match="greedy must be true or false, got 'often'"):
        parser.parse_args(["--config", str(path)])


def test_an_empty_file_has_no_flags(tmp_path):
    (tmp_path / "flags.yaml").write_text("# none\n")
    assert values_in(tmp_path / "flags.yaml", {}) == {}
