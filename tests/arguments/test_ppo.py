"""The flags of PPO."""

import dataclasses

import pytest
from step_flags import assert_refused, rlhf

from dschat.arguments import PpoArguments


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


def test_k1_in_the_loss_is_said_to_hold_nothing_back(capsys):
    rlhf("--kl_in", "loss", "--kl_estimator", "k1")
    assert "k2 and k3 do" in capsys.readouterr().out


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PpoArguments().kl_coef = 1


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
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
        (["--rollout_correction", "is"], ["--rollout_correction", "tis"]),
        (["--tis_cap", "1"], ["--tis_cap", "above 1", "2 is usual"]),
        (
            ["--normalize_scores", "--score_normalization", "running"],
            ["--normalize_scores", "running contradict"],
        ),
        (
            ["--advantage_estimator", "reinforce++", "--critic_warmup_steps", "2"],
            ["--critic_warmup_steps 2", "reinforce++ has none"],
        ),
        (["--unsup_coef", "-1"], ["--unsup_coef", "at least 0"]),
        (
            ["--unsupervised_dataset_config_name", "raw"],
            ["--unsupervised_dataset_config_name raw", "--unsupervised_dataset_name"],
        ),
        (["--per_device_training_batch_size", "0"], ["--per_device_training_batch_size", "at least 1"]),
    ],
)
def test_a_setting_that_cannot_work_names_flag_value_and_remedy(argv, parts):
    assert_refused(argv, parts)
