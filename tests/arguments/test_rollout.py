"""The flags of sampling."""

import pytest
from step_flags import assert_refused


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--rollout_tolerance", "-1"], ["--rollout_tolerance", "at least 0", "0 is no check"]),
        (["--rollout_on_mismatch", "hope"], ["--rollout_on_mismatch", "hope", "uncached"]),
        (["--num_samples_per_prompt", "0"], ["--num_samples_per_prompt", "at least 1"]),
        (["--temperature", "0"], ["--temperature", "positive"]),
        (["--top_p", "1.2"], ["--top_p", "1.2"]),
    ],
)
def test_a_setting_that_cannot_work_names_flag_value_and_remedy(argv, parts):
    assert_refused(argv, parts)


@pytest.mark.parametrize("name", ["max_prompt_seq_len", "max_answer_seq_len", "print_answers_interval"])
def test_lengths_and_intervals_are_at_least_1(name):
    assert_refused([f"--{name}=0"], [f"--{name} must be at least 1, got 0"])
