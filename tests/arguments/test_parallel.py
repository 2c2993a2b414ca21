import json

import pytest
from step_flags import MODEL, assert_refused

from dschat.arguments import parse_arguments


@pytest.mark.parametrize("step", ["sft", "reward", "dpo"])
def test_ranks_that_share_rows_are_an_axis_of_the_mesh(step):
    assert parse_arguments(step, MODEL).parallel_sizes["sequence"] == 1
    args = parse_arguments(step, [*MODEL, "--sequence_parallel_size", "2", "--attn_implementation=sdpa"])
    assert args.parallel_sizes["sequence"] == 2


@pytest.mark.parametrize("way", ["eager", "flash_attention_2"])
def test_shared_rows_have_one_way_to_compute_attention(way):
    flags = ["--sequence_parallel_size=2", f"--attn_implementation={way}"]
    assert_refused(flags, ["--sequence_parallel_size 2 computes", f"--attn_implementation {way}"], "sft")


def test_a_size_below_one_is_refused():
    assert_refused(["--sequence_parallel_size=0"], ["must be at least 1, got 0"], "dpo")


def test_ranks_share_tokens_or_weights():
    flags = ["--sequence_parallel_size=2", "--tensor_parallel_size=4"]
    assert_refused(flags, ["--tensor_parallel_size 4 and --sequence_parallel_size 2"], "reward")


def test_ranks_share_tokens_or_layers():
    flags = ["--sequence_parallel_size=2", "--pipeline_parallel_size=2"]
    assert_refused(flags, ["--sequence_parallel_size 2 and --pipeline_parallel_size 2 cannot"], "sft")


def test_a_pipeline_cannot_have_deepspeeds_timers(tmp_path):
    (tmp_path / "timed.json").write_text(json.dumps({"wall_clock_breakdown": True}))
    flags = ["--pipeline_parallel_size=2", f"--deepspeed_config_override={tmp_path / 'timed.json'}"]
    assert_refused(flags, ["--pipeline_parallel_size 2 cannot be combined", "'wall_clock_breakdown'"], "sft")
