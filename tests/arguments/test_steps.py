import dataclasses
import json

import pytest

from dschat.arguments import (
    STEPS,
    DataArguments,
    ModelArguments,
    PpoArguments,
    parse_arguments,
    without_secrets,
)
from dschat.errors import UserError

STEP3 = ["--actor_model_name_or_path", "a", "--critic_model_name_or_path", "c"]

FOUR_BIT = ["--actor_load_in_4bit", "--actor_lora_dim", "8", "--only_optimize_lora"]


def rlhf(*argv: str):
    return parse_arguments("rlhf", [*STEP3, *argv])


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


def test_lists_and_booleans():
    args = rlhf("--data_path", "x", "y", "--offload", "--actor_zero_stage=2", "--critic_zero_stage=1")
    assert args.data.data_path == ["x", "y"]
    assert args.run.offload
    assert not rlhf("--no_whiten_advantages").ppo.whiten_advantages
    assert not rlhf("--whiten_advantages", "false").ppo.whiten_advantages


@pytest.mark.parametrize(
    ("argv", "estimator"),
    [("", "k1"), ("--kl_in reward", "k1"), ("--kl_in loss", "k3"), ("--kl_in loss --kl_estimator k2", "k2"),
     ("--advantage_estimator grpo --num_samples_per_prompt 2", "k3"),
     ("--advantage_estimator grpo --num_samples_per_prompt 2 --kl_in reward", "k1")],
)  # fmt: skip
def test_the_kl_estimator_fits_the_place_of_the_penalty(argv, estimator):
    assert rlhf(*argv.split()).ppo.penalised_kl == estimator


@pytest.mark.parametrize(
    ("argv", "scale"),
    [("", "none"), ("--normalize_scores", "step2"), ("--score_normalization running", "running"),
     ("--normalize_scores --score_normalization step2", "step2"), ("--score_normalization none", "none")],
)  # fmt: skip
def test_scores_are_normalised_by_what_either_flag_says(argv, scale):
    assert rlhf(*argv.split()).ppo.score_scale == scale


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


def test_k1_in_the_loss_is_said_to_hold_nothing_back(capsys):
    rlhf("--kl_in", "loss", "--kl_estimator", "k1")
    assert "k2 and k3 do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("--top_p 0.9", "with --top_p 0.9;"),
        ("--top_k 50", "with --top_k 50;"),
        ("--top_k 50 --top_p 0.9", "with --top_k 50 and --top_p 0.9;"),
        ("--top_p 1 --top_k 0", None),
    ],
)
def test_that_nothing_corrects_for_truncated_sampling_is_said(argv, named, capsys):
    rlhf(*argv.split())
    said = capsys.readouterr().out
    assert named in said if named else "sampled with" not in said


@pytest.mark.parametrize(
    ("argv", "aligns"),
    [("--dtype fp16", True), ("", False), ("--dtype fp16 --advantage_estimator reinforce++", False)],
)
def test_overflows_are_aligned_in_fp16_with_a_critic_and_else_said_not_to_be(argv, aligns, capsys):
    assert rlhf("--align_overflow", *argv.split()).aligns_overflow == aligns
    assert ("--align_overflow is ignored" in capsys.readouterr().out) != aligns
    assert not rlhf("--dtype", "fp16").aligns_overflow


def test_hyphens_are_accepted_for_underscores():
    assert rlhf("--kl-coef", "0.3").ppo.kl_coef == 0.3


# Every flag of DeepSpeed-Chat that these steps have so far keeps its name.
@pytest.mark.parametrize(
    ("step", "argv"),
    [
        ("sft", "--sft_only_data_path x --data_output_path /o --print_loss --compute_fp32_loss --deepspeed"),
        ("sft", "--local_rank 1 --add_eot_token --eot_token <e> --enable_tensorboard --tensorboard_path t"),
        ("reward", "--num_padding_at_beginning 1 --eval_interval 5 --eval_iters 3 --dropout 0.1"),
        ("reward", "--offload --zero_stage 2 --lr_scheduler_type linear --num_warmup_steps 4"),
        ("reward", "--weight_decay 0.1 --gradient_checkpointing --num_train_epochs 2 --max_seq_len 64"),
        ("rlhf", "--per_device_generation_batch_size 4 --per_device_training_batch_size 2"),
        ("rlhf", "--generation_batches 3 --num_padding_at_beginning 1 --actor_dropout 0 --critic_dropout 0"),
        ("rlhf", "--ppo_epochs 2 --max_prompt_seq_len 9 --max_answer_seq_len 9 --enable_ema --print_answers"),
        ("rlhf", "--print_answers_interval 5 --enable_test_mode --test_stop_step 2"),
        ("rlhf", "--actor_zero_stage 3 --offload_reference_model --actor_gradient_checkpointing"),
        ("rlhf", "--critic_zero_stage 3 --offload_reward_model --critic_gradient_checkpointing"),
        ("rlhf", "--unsupervised_dataset_name wikitext --unsup_coef 27.8"),
        ("rlhf", "--unsupervised_dataset_name wikitext --unsupervised_dataset_config_name wikitext-2-raw-v1"),
        ("rlhf", "--actor_weight_decay 0 --critic_weight_decay 0 --align_overflow"),
        ("sft", "--lora_dim 128 --lora_module_name decoder.layers. --lora_learning_rate 5e-4"),
        ("reward", "--lora_dim 128 --lora_module_name decoder.layers. --only_optimize_lora"),
        ("rlhf", "--actor_lora_dim 128 --actor_lora_module_name decoder.layers. --only_optimize_lora"),
        ("rlhf", "--critic_lora_dim 128 --critic_lora_module_name decoder.layers."),
        ("rlhf", "--actor_lora_learning_rate 5e-4 --critic_lora_learning_rate 5e-4"),
    ],
)  # fmt: skip
def test_deepspeed_chats_flags_are_accepted(step, argv):
    required = STEP3 if step == "rlhf" else ["--model_name_or_path", "m"]
    parse_arguments(step, [*required, *argv.split()])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://host:80/a@b", "http://host:80/a@b"),  # no password
        ("http://us:p/w@host/", "http://***@host/"),  # what should have been escaped
        ("http://us:p?w=#@host/?a=b", "http://***@host/?a=***"),
        ("http://us:p'w@host/", "http://***@host/"),
        (
            "see 'HTTPS://us:pw@[::1]:8/' and http://us@host.",
            "see 'HTTPS://***@[::1]:8/' and http://***@host.",
        ),
        ("hub://us:pw@host", "hub://us:pw@host"),  # another kind of name
    ],
)
def test_what_of_a_url_is_shown(text, shown):
    assert without_secrets(text) == shown


@pytest.mark.parametrize(
    ("argv", "num_steps", "expected"),
    [
        ([], 8, 8),  # the default of step 3, 100, is more than there are
        ([], 400, 100),
        (["--warmup_ratio", "0.1"], 25, 3),
        (["--warmup_ratio=0"], 25, 0),
        (["--lr_scheduler_type", "constant"], 400, 0),
    ],
)
def test_warm_up_is_a_number_of_steps_or_a_share_of_the_run(argv, num_steps, expected):
    assert rlhf(*argv).optimizer.warmup_steps(num_steps) == expected


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


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--warmup_ratio", "0.1", "--num_warmup_steps=100"], ["--warmup_ratio", "exclude each other"]),
        (["--warmup_ratio", "10"], ["--warmup_ratio must lie in [0, 1]", "10", "--num_warmup_steps"]),
        (["--warmup_ratio", "0.1", "--lr_scheduler_type", "constant"], ["constant_with_warmup"]),
        (["--reward_endpoint", "http://us:word@host:port/"], ["--reward_endpoint 'http://***@host:port/'"]),
        (["--reward_endpoint", "http:///score"], ["--reward_endpoint", "must be a URL"]),
        (["--kl_coeff", "1"], ["unknown flag --kl_coeff", "did you mean --kl_coef"]),
        (["--actor_zero_stage", "4"], ["--actor_zero_stage", "got 4", "0, 1, 2 or 3"]),
        (["--ratio_clip", "1.5"], ["--ratio_clip", "1.5", "0.2"]),
        (["--kl_target", "0"], ["--kl_target", "positive", "got 0"]),
        (["--kl_target", "6", "--kl_coef", "0"], ["--kl_target", "--kl_coef", "0.1 is usual"]),
        (["--kl_horizon", "0"], ["--kl_horizon", "at least 1", "got 0"]),
        (["--kl_in", "loss", "--kl_estimator", "k4"], ["--kl_estimator", "k4", "k3"]),
        (["--dual_clip", "1"], ["--dual_clip", "above 1", "3 is usual"]),
        (["--ratio_clip_high", "0"], ["--ratio_clip_high", "positive", "0.28"]),
        (["--entropy_coef", "-1"], ["--entropy_coef", "at least 0"]),
        (["--critic_warmup_steps", "-1"], ["--critic_warmup_steps", "at least 0"]),
        (["--target_approx_kl", "0"], ["--target_approx_kl", "positive", "0.02"]),
        (["--rollout_tolerance", "-1"], ["--rollout_tolerance", "at least 0", "0 is no check"]),
        (["--rollout_on_mismatch", "hope"], ["--rollout_on_mismatch", "hope", "uncached"]),
        (["--rollout_correction", "is"], ["--rollout_correction", "tis"]),
        (["--tis_cap", "1"], ["--tis_cap", "above 1", "2 is usual"]),
        (
            ["--normalize_scores", "--score_normalization", "running"],
            ["--normalize_scores", "running contradict"],
        ),
        (["--advantage_estimator", "rloo"], ["rloo", "--num_samples_per_prompt", "got 1", "4 is usual"]),
        (["--advantage_estimator", "grpo"], ["grpo", "--num_samples_per_prompt", "got 1", "4 is usual"]),
        (["--num_samples_per_prompt", "0"], ["--num_samples_per_prompt", "at least 1"]),
        (
            ["--advantage_estimator", "reinforce++", "--critic_warmup_steps", "2"],
            ["--critic_warmup_steps 2", "reinforce++ has none"],
        ),
        (["--unsup_coef", "-1"], ["--unsup_coef", "at least 0"]),
        (
            ["--unsupervised_dataset_config_name", "raw"],
            ["--unsupervised_dataset_config_name raw", "--unsupervised_dataset_name"],
        ),
        (["--eval_interval", "-1"], ["--eval_interval", "at least 0"]),
        (["--patience", "-1"], ["--patience", "at least 0"]),
        (["--num_eval_prompts", "0"], ["--num_eval_prompts", "got 0", "--eval_interval 0"]),
        (["--eval_samples_per_prompt", "0"], ["--eval_samples_per_prompt", "positive", "got 0"]),
        (["--max_kl", "0"], ["--max_kl", "positive", "inf"]),
        (["--max_length_ratio", "1"], ["--max_length_ratio", "above 1", "inf"]),
        (["--min_entropy_ratio", "1"], ["--min_entropy_ratio", "[0, 1)", "got 1.0"]),
        (["--min_eos_ratio", "-0.1"], ["--min_eos_ratio", "[0, 1)", "got -0.1"]),
        (["--export_actor", "first"], ["--export_actor", "first", "best"]),
        (
            ["--guard_reward_model_name_or_path", "x", "--eval_interval", "0"],
            ["--guard_reward_model_name_or_path", "--eval_interval 0"],
        ),
        (["--reward_function", "rules.py"], ["--reward_function 'rules.py'", "FILE.py:NAME"]),
        (["--reward_function", "rules:f"], ["--reward_function 'rules:f'", "FILE.py:NAME"]),
        (["--reward_function", "a.py:f", "b.py:f"], ["two sources", "'f'"]),
        (["--reward_function", "a.py:model"], ["two sources", "'model'"]),
        (["--reward_endpoint", "localhost:8000"], ["--reward_endpoint", "http://localhost:8000/score"]),
        (["--reward_weights", "model=1"], ["--reward_weights", "alone", "--reward_function"]),
        (
            ["--reward_function", "a.py:f", "--reward_weights", "f=much"],
            ["--reward_weights 'f=much'", "NAME=NUMBER"],
        ),
        (
            ["--reward_function", "a.py:f", "--reward_weights", "g=1"],
            ["--reward_weights", "called g", "there are model, f"],
        ),
        (["--reward_timeout", "0"], ["--reward_timeout", "positive"]),
        (["--reward_endpoint_timeout", "-1"], ["--reward_endpoint_timeout", "positive"]),
        (["--reward_endpoint_retries", "-1"], ["--reward_endpoint_retries", "at least 0"]),
        (["--reward_batch_size", "0"], ["--reward_batch_size", "at least 1"]),
        (["--reward_on_error", "nan"], ["--reward_on_error", "finite"]),
        (["--dtype", "int8"], ["--dtype", "int8", "bf16"]),
        (["--kl_coef", "much"], ["--kl_coef", "much"]),
        (["--data_split", "2,4"], ["--data_split", "2,4,4", "'2,4'"]),
        (["--data_split", "0,0,0"], ["--data_split"]),
        (["--eval_fraction", "1"], ["--eval_fraction", "1.0", "0.05"]),
        (["--temperature", "0"], ["--temperature", "positive"]),
        (["--top_p", "1.2"], ["--top_p", "1.2"]),
        (["--offload", "--critic_zero_stage", "1"], ["--offload", "--actor_zero_stage 2"]),
        (["--offload_reference_model"], ["--offload_reference_model", "--actor_zero_stage 3"]),
        (["--offload_reward_model"], ["--offload_reward_model", "--critic_zero_stage 3"]),
        (["--actor_dropout", "0.1"], ["--actor_dropout", "must be 0"]),
        (["--critic_lora_dropout", "0.1"], ["--critic_lora_dropout", "must be 0"]),
        (["--seed", str(2**70)], ["--seed", "2**63"]),
        (["--enable_test_mode"], ["--enable_test_mode", "--test_stop_step"]),
        (["--gradient_accumulation_steps", "3"], ["16 answers", "takes 48", "--generation_batches 48"]),
        (["--only_optimize_lora"], ["--only_optimize_lora", "--actor_lora_dim or --critic_lora_dim"]),
        (["--actor_lora_dim", "-1"], ["--actor_lora_dim", "at least 0", "-1"]),
        (["--critic_lora_alpha", "0"], ["--critic_lora_alpha", "positive", "--critic_lora_dim"]),
        (["--actor_lora_dropout", "1"], ["--actor_lora_dropout", "[0, 1)", "1.0"]),
        (["--actor_lora_learning_rate", "-1"], ["--actor_lora_learning_rate", "at least 0"]),
        (
            ["--actor_lora_config", "f.json", "--actor_lora_dim", "8"],
            ["--actor_lora_config f.json", "_lora_dim"],
        ),
        (
            ["--critic_lora_config", "f.json", "--critic_lora_alpha", "8"],
            ["--critic_lora_alpha", "one of them"],
        ),
        (
            ["--critic_load_in_4bit"],
            ["--critic_load_in_4bit", "--critic_lora_dim 64 or --critic_lora_config"],
        ),
        ([*FOUR_BIT[:-1]], ["--actor_load_in_4bit", "add --only_optimize_lora"]),
        ([*FOUR_BIT, "--actor_zero_stage", "3"], ["--actor_load_in_4bit", "use --actor_zero_stage 2"]),
        (
            [*FOUR_BIT, "--offload", "--actor_zero_stage", "1", "--critic_zero_stage", "1"],
            ["leave out --offload"],
        ),
        ([*FOUR_BIT, "--dtype", "fp16"], ["--dtype fp16", "use --dtype bf16"]),
        (["--actor_learning_rate", "inf"], ["--actor_learning_rate must be a finite number", "got inf"]),
        (["--gamma", "nan"], ["--gamma must be a finite number", "got nan"]),
        (["--reward_clip", "1e19"], ["--reward_clip", "2**63"]),
        (["--num_train_epochs", "9" * 30], ["--num_train_epochs", "2**63"]),
        (["--num_train_epochs", "0"], ["--num_train_epochs", "positive", "0.5 is half"]),
        (["--num_train_epochs=-0.5"], ["--num_train_epochs", "positive", "got -0.5"]),
        (["--data_split", "1,1," + "9" * 400], ["--data_split needs three shares"]),
        (["--actor_zero_stage=--"], ["argument --actor_zero_stage: expected a value, got '--'"]),
        (["--offload", "yes", ""], ["'' belongs to no flag"]),
        (["--per_device_training_batch_size", "0"], ["--per_device_training_batch_size", "at least 1"]),
    ],
)
def test_a_setting_that_cannot_work_names_flag_value_and_remedy(argv, parts):
    with pytest.raises(UserError) as error:
        rlhf(*argv)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--beta", "0"], ["--beta", "positive", "0.1"]),
        (["--label_smoothing", "0.5"], ["--label_smoothing", "[0, 0.5)"]),
        (["--label_smoothing", "0.1", "--loss_type", "ipo"], ["--label_smoothing 0.1", "--loss_type ipo"]),
        (["--loss_type", "hinge"], ["--loss_type", "hinge", "ipo"]),
        (["--offload_reference_model", "--zero_stage", "2"], ["--offload_reference_model", "--zero_stage 3"]),
        (["--offload"], ["--offload", "--zero_stage 2"]),
        (["--only_optimize_lora"], ["--only_optimize_lora", "--lora_dim"]),
    ],
)
def test_a_setting_of_dpo_that_cannot_work_is_named(argv, parts):
    with pytest.raises(UserError) as error:
        parse_arguments("dpo", ["--model_name_or_path", "m", *argv])
    for part in parts:
        assert part in str(error.value)


def test_the_remedy_for_too_few_answers_works():
    args = rlhf("--gradient_accumulation_steps", "3", "--generation_batches", "48")
    assert args.rollout_size % args.minibatch_size == 0


def test_a_missing_model_is_named():
    with pytest.raises(UserError, match="--model_name_or_path"):
        parse_arguments("sft", [])


def test_adapters_alone_is_one_flag_for_both_models_of_step_3():
    args = rlhf("--critic_lora_dim", "8", "--only_optimize_lora")
    assert args.optimizer.only_optimize_lora
    assert (args.actor.lora_dim, args.critic.lora_dim) == (0, 8)
    with pytest.raises(UserError, match="unknown flag --actor_only_optimize_lora"):
        rlhf("--actor_lora_dim", "8", "--actor_only_optimize_lora")
    with pytest.raises(UserError, match="add --lora_dim, for example 64"):
        parse_arguments("sft", ["--model_name_or_path", "m", "--only_optimize_lora"])


def test_a_file_of_adapters_is_as_good_as_a_rank():
    args = parse_arguments(
        "sft", ["--model_name_or_path", "m", "--lora_config", "f", "--only_optimize_lora", "--load_in_4bit"]
    )
    assert args.model.uses_lora
    assert not rlhf("--actor_lora_config", "f").critic.uses_lora


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PpoArguments().kl_coef = 1


@pytest.mark.parametrize("step", STEPS)
def test_every_flag_has_a_help_line(step):
    for part in dataclasses.fields(STEPS[step]):
        for f in dataclasses.fields(part.metadata["group"]):
            if "help" in f.metadata:
                assert f.metadata["help"].endswith("."), f.name


def test_arguments_are_written_as_json(tmp_path):
    rlhf("--seed", "7").description.write(tmp_path / "arguments.json")
    written = json.loads((tmp_path / "arguments.json").read_text())
    assert written["run"]["seed"] == 7
    assert written["actor"]["model_name_or_path"] == "a"


def test_groups_check_themselves_without_a_parser():
    assert DataArguments(data_split="1, 0,2.5").shares == (1, 0, 2.5)
    with pytest.raises(UserError, match="--learning_rate"):
        ModelArguments(model_name_or_path="m", learning_rate=-1)


@pytest.mark.parametrize("name", ["max_kl", "max_length_ratio"])
def test_a_limit_is_switched_off_by_inf(name):
    assert getattr(rlhf(f"--{name}", "inf").guard, name) == float("inf")
    with pytest.raises(UserError, match=f"--{name} must be a finite number"):
        rlhf(f"--{name}", "nan")
