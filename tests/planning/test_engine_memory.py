"""What an engine holds, by ZeRO stage."""

import pytest
from plans import CONFIGS, arguments, planned, size, specs_of

from dschat.planning.engine_memory import EngineMemory, total
from dschat.planning.hardware import Hardware
from dschat.planning.models import planned_models


def test_stages_shard_what_they_say():
    found = {
        stage: planned(arguments("sft", f"--zero_stage={stage}"), ranks=4).phases["train"]
        for stage in (0, 1, 2, 3)
    }
    whole = size(found[0], "weights")
    assert size(found[0], "optimiser") == 2 * whole  # two averages, and in fp32 no copy of the weights
    assert size(found[1], "optimiser") == size(found[2], "optimiser") == pytest.approx(3 * whole / 4)
    assert size(found[2], "weights") == whole
    assert size(found[3], "weights") < 0.6 * whole
    assert size(found[3], "gathered weights") > 0


def test_offloaded_gradients_pass_through_two_buffers_of_the_largest_parameter():
    args = arguments("sft", "--zero_stage=2", "--offload")
    (model,) = planned_models(specs_of(args), only_adapters=False, configs=CONFIGS)
    buffers = [part for part in planned(args).phases["train"] if part.kind == "buffers"]
    assert model.largest == model.config.vocab_size * 32
    assert [part.bytes for part in buffers if part.on_host] == [model.largest * 4]
    assert model.largest * 4 in [part.bytes for part in buffers if not part.on_host]


def test_offloaded_gradients_are_kept_twice_where_they_add_up():
    once, twice = (
        planned(arguments("sft", "--zero_stage=2", "--offload", *more)).phases["train"]
        for more in ((), ("--gradient_accumulation_steps=2",))
    )
    kept = [sum(p.bytes for p in moment if p.kind == "gradients" and p.on_host) for moment in (once, twice)]
    assert kept[1] == 2 * kept[0] > 0


def test_offloading_moves_states_to_the_host():
    there = planned(arguments("sft", "--zero_stage=2"), ranks=2).phases["train"]
    gone = planned(arguments("sft", "--zero_stage=2", "--offload"), ranks=2).phases["train"]
    assert total(gone) < total(there)
    assert total(gone, on_host=True) >= size(there, "optimiser")


def test_buckets_that_are_not_written_to_take_no_memory_on_a_cpu():
    on_cpu, on_gpu = (
        planned(arguments("sft", "--zero_stage=2"), device=kind).phases["train"] for kind in ("cpu", "cuda")
    )
    assert size(on_cpu, "buffers") < 1e8 < size(on_gpu, "buffers")


def test_stage_3_copies_a_bucket_to_reduce_it_and_gloo_once_more():
    args = arguments("sft", "--zero_stage=3")
    (model,) = planned_models(specs_of(args), only_adapters=False, configs=CONFIGS)
    on_cpu, on_gpu = (
        EngineMemory(model, Hardware(device=kind), 1, accumulates=False).end_of_backward()
        for kind in ("cpu", "cuda")
    )
    assert size(on_gpu, "gradients") == model.counts.whole * 4
    assert size(on_cpu, "gradients") == 2 * model.counts.whole * 4
