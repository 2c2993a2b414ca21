"""Command lines with mistakes: unknown flags, words that belong to none, flags given twice."""

import re

import pytest
from step_flags import assert_refused, refusal

from dschat.arguments import STEPS, flags_of, parse_arguments

TRAINING = ("sft", "reward", "dpo", "rlhf")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--kl_coeff", "1"], ["unknown flag --kl_coeff", "did you mean --kl_coef"]),
        (["--actor_zero_stage=--"], ["argument --actor_zero_stage: expected a value, got '--'"]),
        (["--offload", "yes", ""], ["'' belongs to no flag"]),
    ],
)
def test_a_setting_that_cannot_work_names_flag_value_and_remedy(argv, parts):
    assert_refused(argv, parts)


@pytest.mark.parametrize("step", TRAINING)
def test_all_unknown_flags_stand_in_one_message_before_missing_and_wrong_ones(step):
    told = refusal(step, "--lr", "1e-5", "--logging_steps", "5", "--zzz=3", "--seed", "much", "-bf16", "True")
    lines = told.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["--lr", "--logging_steps", "--zzz", "-bf16"]
    assert "required" not in told
    assert "much" not in told


@pytest.mark.parametrize("name", ["lear", "foo", "zzz", "e"])
def test_nothing_unlike_is_suggested_and_nothing_is_abbreviated(name):
    assert refusal("sft", f"--{name}", "1") == f"unknown flag --{name}. --help lists every flag."


@pytest.mark.parametrize(
    ("word", "explanation"),
    [
        ("-learning_rate", "did you mean --learning_rate?"),
        ("–learning_rate", "did you mean --learning_rate?"),  # noqa: RUF001
        ("—lr", "here: --learning_rate"),
        ("--LEARNING-RATE", "did you mean --learning_rate?"),
        ("--max_seq_lenght", "here: --max_seq_len"),
    ],
)
def test_other_spellings_are_recognised(word, explanation):
    assert f"unknown flag {word} ({explanation})" in refusal("sft", word, "1")
    assert f"unknown flag {word} ({explanation})" in refusal("sft", f"{word}=a b")


def test_values_that_look_like_flags():
    model = ["--model_name_or_path", "m"]
    assert "written --eot_token=--end" in refusal("sft", *model, "--eot_token", "--end")
    assert parse_arguments("sft", [*model, "--eot_token=--end"]).tokenizer.eot_token == "--end"
    assert "two words, without quotes" in refusal("sft", *model, "--offload", "true", "--learning_rate 1")
    assert "(here: --learning_rate)" in refusal("sft", *model, "--offload", "true", "trainer.optim.lr=1")
    step3 = ["--actor_model_name_or_path", "a", "--reward_function", "f.py:f", "--reward_on_error"]
    for number in ("-1", "-0.5", "-1e-5", "-1E5"):
        assert parse_arguments("rlhf", [*step3, number]).rewards.reward_on_error == float(number)


def test_of_a_flag_that_is_given_twice_the_last_counts_and_that_is_said(capsys):
    argv = ["--model_name_or_path", "m", "--seed", "1", "--data_path", "a", "--data-path=b", "--seed=2"]
    args = parse_arguments("sft", argv)
    assert (args.run.seed, args.data.data_path) == (2, ["b"])
    said = capsys.readouterr().out
    assert "note: --seed is given 2 times, and only the last counts.\n" in said
    assert "--data_path is given 2 times, and only the last counts; several values go after one" in said


@pytest.mark.parametrize("step", STEPS)
def test_the_help_begins_with_ten_flags_and_has_every_flag_once(step, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(step, ["--help"])
    text = capsys.readouterr().out
    named = re.findall(r"^  (?:-h, )?--(\w+)", text, re.MULTILINE)
    turned_off = {name for name in named if name.startswith("no_")}
    assert sorted(set(named) - turned_off) == sorted({"help", "config", *flags_of(step)})
    assert len(named) == len(set(named))
    first = text.partition("flags to know")[2].partition("\noptions:")[0]
    assert len(re.findall("^  --", first, re.MULTILINE)) == 10
    assert "default: None" not in text
