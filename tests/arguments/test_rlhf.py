"""Step 3's other settings."""

import pytest
from step_flags import rlhf


@pytest.mark.parametrize(("argv", "path"), [([], "c"), (["--reward_model_name_or_path", "r"], "r")])
def test_the_reward_model_is_the_one_the_critic_starts_from_unless_it_is_named(argv, path):
    assert rlhf(*argv).reward_path == path


def test_the_padding_flag_of_deepspeed_chat_changes_nothing_and_that_is_noted(capsys):
    assert rlhf("--num_padding_at_beginning", "1").rlhf.num_padding_at_beginning == 1
    assert "--num_padding_at_beginning is not needed and ignored" in capsys.readouterr().out


def test_a_short_test_says_how_many_steps_it_takes():
    args = rlhf("--enable_test_mode", "--test_stop_step", "3")
    assert args.rlhf.enable_test_mode
    assert args.rlhf.test_stop_step == 3
