"""The flags of steps 1 and 2 and of DPO."""

import pytest
from step_flags import MODEL, assert_refused

from dschat.arguments import parse_arguments


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--beta", "0"], ["--beta", "positive", "0.1"]),
        (["--label_smoothing", "0.5"], ["--label_smoothing", "[0, 0.5)"]),
        (["--label_smoothing", "0.1", "--loss_type", "ipo"], ["--label_smoothing 0.1", "--loss_type ipo"]),
        (["--loss_type", "hinge"], ["--loss_type", "hinge", "ipo"]),
    ],
)
def test_a_setting_of_dpo_that_cannot_work_is_named(argv, parts):
    assert_refused(argv, parts, "dpo")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--per_device_train_batch_size", "0"], ["--per_device_train_batch_size must be at least 1, got 0"]),
        (["--per_device_eval_batch_size", "0"], ["--per_device_eval_batch_size must be at least 1, got 0"]),
        (["--max_tokens_per_batch", "-1"], ["--max_tokens_per_batch must be at least 0, got -1"]),
        (["--eval_interval", "-1"], ["--eval_interval must be at least 0, got -1"]),
        (["--max_seq_len", "3"], ["--max_seq_len must be at least 4 tokens, got 3"]),
        (["--export_model", "first"], ["--export_model", "first", "best"]),
    ],
)
def test_batches_that_cannot_work_are_named(argv, parts):
    assert_refused(argv, parts, "reward")


def test_step_2_exports_the_best_model_and_the_others_the_last():
    exported = {step: parse_arguments(step, MODEL).batch.export_model for step in ("sft", "reward", "dpo")}
    assert exported == {"sft": "last", "reward": "best", "dpo": "last"}
