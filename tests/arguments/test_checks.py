"""Checks across the groups of a step."""

import pytest
from step_flags import assert_refused, rlhf

from dschat.arguments import parse_arguments
from dschat.errors import UserError

FOUR_BIT = ["--actor_load_in_4bit", "--actor_lora_dim", "8", "--only_optimize_lora"]


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--offload", "--critic_zero_stage", "1"], ["--offload", "--actor_zero_stage 2"]),
        (["--only_optimize_lora"], ["--only_optimize_lora", "--actor_lora_dim or --critic_lora_dim"]),
        (
            ["--critic_load_in_4bit"],
            ["--critic_load_in_4bit", "--critic_lora_dim 64 or --critic_lora_config"],
        ),
        ([*FOUR_BIT[:-1]], ["--actor_load_in_4bit", "add --only_optimize_lora"]),
        (
            [*FOUR_BIT, "--offload", "--actor_zero_stage", "1", "--critic_zero_stage", "1"],
            ["leave out --offload"],
        ),
        ([*FOUR_BIT, "--actor_zero_stage", "3"], ["--actor_load_in_4bit", "use --actor_zero_stage 2"]),
        ([*FOUR_BIT, "--dtype", "fp16"], ["--dtype fp16", "use --dtype bf16"]),
    ],
)
def test_a_setting_that_cannot_work_names_flag_value_and_remedy(argv, parts):
    assert_refused(argv, parts)


def test_adapters_alone_is_one_flag_for_both_models_of_step_3():
    args = rlhf("--critic_lora_dim", "8", "--only_optimize_lora")
    assert args.optimizer.only_optimize_lora
    assert (args.actor.lora_dim, args.critic.lora_dim) == (0, 8)
    with pytest.raises(UserError, match="unknown flag --actor_only_optimize_lora"):
        rlhf("--actor_lora_dim", "8", "--actor_only_optimize_lora")
    with pytest.raises(UserError, match="add --lora_dim, for example 64"):
        parse_arguments("sft", ["--model_name_or_path", "m", "--only_optimize_lora"])


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
    ("more", "part"),
    [
        (["--zero_stage=2"], "--zero_stage 2, which shards gradients; use --zero_stage 1"),
        (["--zero_stage=1", "--offload"], "--offload"),
        (["--lora_dim=4", "--only_optimize_lora", "--load_in_4bit"], "--load_in_4bit"),
        (["--dtype=fp16"], "--dtype bf16"),
        (["--sequence_parallel_size=2"], "--sequence_parallel_size"),
        (["--auto_micro_batch"], "--auto_micro_batch"),
        (["--pipeline_parallel_size=0"], "--pipeline_parallel_size must be at least 1"),
    ],
)
@pytest.mark.parametrize("step", ["sft", "reward", "dpo"])
def test_a_pipeline_is_refused_with_what_it_cannot_do(step, more, part):
    assert_refused(["--pipeline_parallel_size=2", *more], ["--pipeline_parallel_size", part], step)
