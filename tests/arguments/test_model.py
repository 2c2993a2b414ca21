"""The flags of a model and of its optimiser."""

import pytest
from step_flags import assert_refused, rlhf

from dschat.arguments import ModelArguments, parse_arguments
from dschat.errors import UserError


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--warmup_ratio", "10"], ["--warmup_ratio must lie in [0, 1]", "10", "--num_warmup_steps"]),
        (["--warmup_ratio", "0.1", "--lr_scheduler_type", "constant"], ["constant_with_warmup"]),
        (["--actor_zero_stage", "4"], ["--actor_zero_stage", "got 4", "0, 1, 2 or 3"]),
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
        (["--num_train_epochs", "0"], ["--num_train_epochs", "positive", "0.5 is half"]),
        (["--num_train_epochs=-0.5"], ["--num_train_epochs", "positive", "got -0.5"]),
    ],
)
def test_a_setting_that_cannot_work_names_flag_value_and_remedy(argv, parts):
    assert_refused(argv, parts)


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


def test_a_file_of_adapters_is_as_good_as_a_rank():
    args = parse_arguments(
        "sft", ["--model_name_or_path", "m", "--lora_config", "f", "--only_optimize_lora", "--load_in_4bit"]
    )
    assert args.model.uses_lora
    assert not rlhf("--actor_lora_config", "f").critic.uses_lora


def test_groups_check_themselves_without_a_parser():
    with pytest.raises(UserError, match="--learning_rate"):
        ModelArguments(model_name_or_path="m", learning_rate=-1)
