"""Flags that are not there: named together, before anything else, with their names here."""

import re

import pytest

from dschat.arguments import FOREIGN, PROGRAMS, STEPS, flags_of, parse_arguments
from dschat.errors import UserError

TRAINING = ("sft", "reward", "dpo", "rlhf")


def message(step: str, *argv: str) -> str:
    with pytest.raises(UserError) as error:
        parse_arguments(step, argv)
    return str(error.value)


@pytest.mark.parametrize("step", STEPS)
def test_what_is_suggested_exists_where_it_is_said_to(step):
    names = {*FOREIGN, "actor_lr", "critic_lora_rank", "critic_bf16", "ddp_timeout", "vllm_mode"} - flags_of(
        step
    )
    lines = message(step, *(f"--{name}" for name in names)).splitlines()[1:]
    assert len(lines) == len(names)
    for line in lines:
        told = re.fullmatch(r"  --\w+ \((here: .*--.*|not there\b.*|not of this step; in (\S+): .+)\)", line)
        assert told, line
        of_step = next((s for s, program in PROGRAMS.items() if program == told[2]), step)
        assert set(re.findall(r"--(\w+)", told[1])) <= flags_of(of_step), line


def test_a_flag_of_the_trainer_of_transformers_that_is_not_here_is_explained():
    """Those that matter; what steers its own machinery is at least not taken for another flag."""
    asked = ["hub_strategy", "dataloader_drop_last", "ddp_find_unused_parameters", "fsdp_config", "optim"]
    asked += ["bf16_full_eval", "logging_nan_inf_filter", "log_on_each_node", "use_cpu", "eval_on_start"]
    told = message("sft", *(f"--{name}" for name in asked))
    assert told.count("(not there") + told.count("(here: ") == len(asked)
    assert "did you mean" not in message("sft", "--ignore_data_skip", "--label_names", "--use_cache")


# The names that new users brought, each with what must stand in the answer of steps 1 and 3.
@pytest.mark.parametrize(
    ("name", "in_step_1", "in_step_3"),
    [
        ("lr", "here: --learning_rate", "here: --actor_learning_rate and --critic_learning_rate"),
        ("learning_rate", None, "here: --actor_learning_rate and --critic_learning_rate"),
        ("actor_lr", "here: --learning_rate", "here: --actor_learning_rate"),
        ("bf16", "here: --dtype bf16", "here: --dtype bf16"),
        ("logging_steps", "not there: every optimiser step", "not there: every optimiser step"),
        ("report_to", "not there: figures go to metrics.jsonl", "not there: figures go to metrics.jsonl"),
        ("max_length", "here: --max_seq_len", "here: --max_prompt_seq_len and --max_answer_seq_len"),
        ("max_new_tokens", "in step3_ppo/main.py: --max_answer_seq_len", "here: --max_answer_seq_len"),
        ("response_length", "in step3_ppo/main.py: --max_answer_seq_len", "here: --max_answer_seq_len"),
        ("init_kl_coef", "in step3_ppo/main.py: --kl_coef", "here: --kl_coef"),
        ("num_ppo_epochs", "in step3_ppo/main.py: --ppo_epochs", "here: --ppo_epochs"),
        ("batch_size", "--per_device_train_batch_size", "--per_device_training_batch_size"),
        ("per_device_train_batch_size", None, "here: --per_device_training_batch_size"),
        ("vf_coef", "not there: the critic", "not there: the critic is a model of its own"),
        ("dataset_name", "here: --data_path", "here: --data_path"),
        ("model", "here: --model_name_or_path", "here: --actor_model_name_or_path and --critic"),
        ("save_steps", "here: --save_interval", "here: --save_interval"),
        ("deepspeed_config", "not there: ", "not there: "),
        ("logging_step", "not there: every optimiser step", "not there: every optimiser step"),
        ("kl_coeff", "in step3_ppo/main.py: --kl_coef", "did you mean --kl_coef?"),
        ("sft_only_data_path", None, "in step1_sft/main.py: --sft_only_data_path"),
    ],
)  # fmt: skip
def test_names_of_other_programs_point_to_ours(name, in_step_1, in_step_3):
    for step, expected in (("sft", in_step_1), ("rlhf", in_step_3)):
        if expected:
            assert expected in message(step, f"--{name}", "1")


@pytest.mark.parametrize("step", TRAINING)
def test_all_unknown_flags_stand_in_one_message_before_missing_and_wrong_ones(step):
    told = message(step, "--lr", "1e-5", "--report_to", "wandb", "--zzz=3", "--seed", "much", "-bf16", "True")
    lines = told.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["--lr", "--report_to", "--zzz", "-bf16"]
    assert "required" not in told
    assert "much" not in told


@pytest.mark.parametrize("name", ["lear", "foo", "zzz", "e"])
def test_nothing_unlike_is_suggested_and_nothing_is_abbreviated(name):
    assert message("sft", f"--{name}", "1") == f"unknown flag --{name}. --help lists every flag."


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
    assert f"unknown flag {word} ({explanation})" in message("sft", word, "1")
    assert f"unknown flag {word} ({explanation})" in message("sft", f"{word}=a b")


def test_values_that_look_like_flags():
    model = ["--model_name_or_path", "m"]
    assert "written --eot_token=--end" in message("sft", *model, "--eot_token", "--end")
    assert parse_arguments("sft", [*model, "--eot_token=--end"]).tokenizer.eot_token == "--end"
    assert "two words, without quotes" in message("sft", *model, "--offload", "true", "--learning_rate 1")
    assert "(here: --learning_rate)" in message("sft", *model, "--offload", "true", "trainer.optim.lr=1")
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


def test_help_comes_before_complaints():
    with pytest.raises(SystemExit) as end:
        parse_arguments("sft", ["--lr", "1", "--help"])
    assert end.value.code == 0
