"""The flags of evaluations and of the guard."""

import pytest
from step_flags import assert_refused, rlhf

from dschat.errors import UserError


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
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
    ],
)
def test_a_setting_that_cannot_work_names_flag_value_and_remedy(argv, parts):
    assert_refused(argv, parts)


@pytest.mark.parametrize("name", ["max_kl", "max_length_ratio"])
def test_a_limit_is_switched_off_by_inf(name):
    assert getattr(rlhf(f"--{name}", "inf").guard, name) == float("inf")
    with pytest.raises(UserError, match=f"--{name} must be a finite number"):
        rlhf(f"--{name}", "nan")
