"""The flags of a run."""

import pytest
from step_flags import assert_refused, rlhf


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--dtype", "int8"], ["--dtype", "int8", "bf16"]),
        (["--seed", str(2**70)], ["--seed", "2**63"]),
    ],
)
def test_a_setting_that_cannot_work_names_flag_value_and_remedy(argv, parts):
    assert_refused(argv, parts)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--save_interval", "5"], ["--save_interval 5 needs --output_dir"]),
        (["--save_minutes", "5"], ["--save_minutes 5.0 needs --output_dir"]),
        (["--resume_from_checkpoint"], ["--resume_from_checkpoint latest needs --output_dir"]),
        (["--overwrite_output_dir"], ["--overwrite_output_dir True needs --output_dir"]),
        (
            ["--output_dir", "o", "--overwrite_output_dir", "--resume_from_checkpoint"],
            ["--overwrite_output_dir", "--resume_from_checkpoint", "give one of them"],
        ),
        (["--max_skipped_steps", "-1"], ["--max_skipped_steps must be at least 0, got -1"]),
        (["--save_total_limit", "-1"], ["--save_total_limit must be at least 0, got -1"]),
    ],
)
def test_flags_of_checkpoints_that_cannot_work_are_named(argv, parts):
    assert_refused(argv, parts)


@pytest.mark.parametrize("steps", ["0", "5-4", "5-", "-5", "all", "1,2"])
def test_a_profile_of_no_steps_is_refused(steps):
    assert_refused(["--output_dir=o", f"--profile={steps}"], [f"--profile {steps} is neither a step"])


def test_a_profile_is_of_a_step_or_several_and_needs_a_folder():
    assert rlhf().run.profiled_steps is None
    assert rlhf("--output_dir=o", "--profile").run.profiled_steps == (3, 5)
    assert rlhf("--output_dir=o", "--profile", "7").run.profiled_steps == (7, 7)
    assert rlhf("--output_dir=o", "--profile=7-9").run.profiled_steps == (7, 9)
    assert_refused(["--profile"], ["--profile 3-5 needs --output_dir"])


def test_resuming_without_a_name_takes_the_newest_checkpoint():
    assert rlhf("--output_dir", "o", "--resume_from_checkpoint").run.resume_from_checkpoint == "latest"
    assert rlhf("--output_dir=o", "--resume_from_checkpoint=c").run.resume_from_checkpoint == "c"
