"""Seconds by phase, from those of passes."""

import pytest
from plans import Remembered, arguments, planned

SECONDS = {"forward": 1.0, "forward_backward": 3.0, "optimizer": 0.5, "reading": 2.0, "writing": 0.25}


def seconds_of(args, *, timed_on=1, **options):
    return planned(args, choices=Remembered(SECONDS, timed_on), **options).seconds


def test_micro_batches_add_up_and_the_optimiser_is_shared_out():
    twice = ("--gradient_accumulation_steps=2",)
    assert seconds_of(arguments("sft", *twice)) == {"forward_backward": 6.0, "optimizer": 0.5}
    assert seconds_of(arguments("sft", *twice, "--zero_stage=2"), ranks=4)["optimizer"] == 0.125
    assert seconds_of(arguments("sft"), ranks=4)["optimizer"] == 0.5


def test_what_as_many_ranks_took_together_has_the_optimisers_share_in_it():
    args = arguments("sft", "--zero_stage=2")
    assert seconds_of(args, ranks=4, timed_on=4)["optimizer"] == 0.5
    assert seconds_of(args, ranks=4, timed_on=2) is None


def test_shorter_rows_take_their_share():
    assert seconds_of(arguments("sft"), mean_length=128.0)["forward_backward"] == pytest.approx(0.75)


def test_stages_of_a_pipeline_wait_for_the_first_and_the_last():
    flags = ("--pipeline_parallel_size=2", "--gradient_accumulation_steps=4")
    # four micro-batches and one more that fills the pipeline, each stage with half of the layers
    assert seconds_of(arguments("sft", *flags), ranks=2)["forward_backward"] == 3.0 * 5 / 2


def test_a_ppo_step_reads_writes_analyses_and_learns():
    args = arguments("rlhf", "--per_device_training_batch_size=4", "--per_device_generation_batch_size=16")
    found = seconds_of(args)
    # prompts of 256 tokens, where 384 were timed, then 256 tokens; four models read four micro-batches; two
    # learn from them, with an optimiser step each
    assert found["generation"] == pytest.approx(2.0 * 256 / 384 + 256 * 0.25)
    assert found["experience"] == 4 * 4 * 1.0
    assert found["training"] == 4 * 2 * 3.0 + 4 * 2 * 0.5


def test_what_is_not_remembered_is_not_told():
    assert planned(arguments("sft"), choices=Remembered(None)).seconds is None
