"""What the passes of a step read at once."""

import pytest

from dschat.arguments import parse_arguments


@pytest.mark.parametrize(
    ("step", "flags", "rows"),
    [
        ("sft", ["--per_device_train_batch_size=6"], 6),
        ("reward", ["--per_device_train_batch_size=6"], 12),
        ("dpo", ["--per_device_train_batch_size=6"], 12),
        ("sft", ["--max_tokens_per_batch=2048", "--max_seq_len=512"], 4),
    ],
)
def test_rows_of_steps_1_and_2(step, flags, rows):
    sizes = parse_arguments(step, ["--model_name_or_path=m", "--data_path=d", *flags]).pass_sizes
    assert sizes.train_rows == rows
    assert sizes.num_outputs == sizes.length == 512


def test_rows_of_step_3_and_other_values_of_flags():
    models = ["--actor_model_name_or_path=a", "--critic_model_name_or_path=c"]
    args = parse_arguments("rlhf", [*models, "--max_answer_seq_len=64", "--generation_batches=2"])
    sizes = args.pass_sizes
    assert (sizes.length, sizes.num_outputs, sizes.rollout_rows) == (320, 64, 32)
    assert args.micro_batch == (16, 1)
    smaller = args.with_flags({"per_device_training_batch_size": 4, "actor_zero_stage": 3})
    assert smaller.micro_batch == (4, 1)
    assert (smaller.actor.zero_stage, smaller.critic.zero_stage) == (3, 0)
