"""The steps' objects: defaults of their own, and checks across their groups."""

import pytest
from step_flags import assert_refused, rlhf

from dschat.arguments import parse_arguments
from dschat.errors import UserError


def test_actor_and_critic_flags_are_the_model_flags_with_a_prefix():
    args = rlhf("--actor_zero_stage", "3", "--critic_learning_rate", "0.5")
    assert (args.actor.zero_stage, args.critic.zero_stage) == (3, 0)
    assert (args.actor.learning_rate, args.critic.learning_rate) == (1e-6, 0.5)


@pytest.mark.parametrize(
    ("step", "required", "learning_rate"),
    [
        ("sft", "--model_name_or_path", 1e-5),
        ("reward", "--model_name_or_path", 9e-6),
        ("dpo", "--model_name_or_path", 5e-7),
    ],
)
def test_steps_have_defaults_of_their_own(step, required, learning_rate):
    args = parse_arguments(step, [required, "m"])
    assert args.model.learning_rate == learning_rate
    assert args.optimizer.adam_epsilon == 1e-8
    assert rlhf().optimizer.adam_epsilon == 1e-5


def without_reward_model(*argv: str):
    return parse_arguments("rlhf", ["--actor_model_name_or_path", "a", *argv])


def test_where_something_else_scores_there_need_be_no_reward_model():
    args = without_reward_model("--reward_function", "rules.py:short", "dir/rules.py:polite")
    assert args.reward_path is None
    assert args.model_paths == ["a"]
    assert args.reward_weights == {"short": 1, "polite": 1}


def test_sources_of_scores_are_weighted_by_name():
    urls = ["http://one/score", "https://two:8000"]
    args = rlhf("--reward_function", "a.py:f", "--reward_endpoint", *urls, "--reward_weights", "f=-0.5",
                "endpoint_2=1e-1", "model=0")  # fmt: skip
    assert args.rewards.endpoints == dict(zip(["endpoint", "endpoint_2"], urls, strict=True))
    assert args.reward_weights == {"model": 0, "f": -0.5, "endpoint": 1, "endpoint_2": 0.1}
    assert rlhf().reward_weights == {"model": 1}


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["nothing scores", "--critic_model_name_or_path", "--reward_function", "--reward_endpoint"]),
        (["--reward_function", "a.py:f", "--normalize_scores"], ["--normalize_scores", "running"]),
        (["--reward_function", "a.py:f", "--reward_weights", "model=1"], ["called model", "there are f"]),
    ],
)
def test_what_lacks_a_reward_model_is_told(argv, parts):
    with pytest.raises(UserError) as error:
        without_reward_model(*argv)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("argv", "tolerance"),
    [("", 0.05), ("--dtype fp32", 1e-4), ("--dtype fp16", 0.01), ("--rollout_tolerance 0.3", 0.3),
     ("--temperature 0.5", 0.1), ("--temperature 2", 0.05), ("--rollout_tolerance 0", 0)],
)  # fmt: skip
def test_the_rollout_tolerance_fits_precision_and_temperature(argv, tolerance):
    assert rlhf(*argv.split()).rollout_tolerance == pytest.approx(tolerance)


@pytest.mark.parametrize(
    ("argv", "records"),
    [("", True), ("--rollout_tolerance 0", False), ("--rollout_tolerance 0 --rollout_correction tis", True)],
)
def test_log_probabilities_are_recorded_for_the_check_and_the_correction(argv, records):
    assert rlhf(*argv.split()).records_rollout_logprobs == records


@pytest.mark.parametrize(
    ("argv", "aligns"),
    [("--dtype fp16", True), ("", False), ("--dtype fp16 --advantage_estimator reinforce++", False)],
)
def test_overflows_are_aligned_in_fp16_with_a_critic_and_else_said_not_to_be(argv, aligns, capsys):
    assert rlhf("--align_overflow", *argv.split()).aligns_overflow == aligns
    assert ("--align_overflow is ignored" in capsys.readouterr().out) != aligns
    assert not rlhf("--dtype", "fp16").aligns_overflow


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--advantage_estimator", "rloo"], ["rloo", "--num_samples_per_prompt", "got 1", "4 is usual"]),
        (["--advantage_estimator", "grpo"], ["grpo", "--num_samples_per_prompt", "got 1", "4 is usual"]),
        (
            ["--reward_function", "a.py:f", "--reward_weights", "g=1"],
            ["--reward_weights", "called g", "there are model, f"],
        ),
        (["--actor_dropout", "0.1"], ["--actor_dropout", "must be 0"]),
        (["--critic_lora_dropout", "0.1"], ["--critic_lora_dropout", "must be 0"]),
        (["--enable_test_mode"], ["--enable_test_mode", "--test_stop_step"]),
        (
            ["--gradient_accumulation_steps", "3"],
            ["16 answers", "takes 48", "3 is the least"],
        ),
    ],
)
def test_a_setting_that_cannot_work_names_flag_value_and_remedy(argv, parts):
    assert_refused(argv, parts)


def test_the_remedy_for_too_few_answers_works():
    args = rlhf("--gradient_accumulation_steps", "3", "--generation_batches", "3")
    assert args.rollout_size % args.minibatch_size == 0


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--offload"], ["--offload", "--zero_stage 2"]),
        (["--only_optimize_lora"], ["--only_optimize_lora", "--lora_dim"]),
    ],
)
def test_checks_across_the_groups_of_dpo(argv, parts):
    assert_refused(argv, parts, "dpo")
