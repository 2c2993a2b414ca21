"""Bytes by phase, model and part."""

from collections import Counter
from types import SimpleNamespace

import pytest
from plans import CONFIGS, arguments, planned, size, specs_of

from dschat.arguments import PassSizes
from dschat.distributed.heap import LARGE
from dschat.planning import engine_memory, memory
from dschat.planning.engine_memory import total
from dschat.planning.hardware import Hardware
from dschat.planning.memory import REUSED, MemoryModel
from dschat.planning.meta_pass import Block, PassShape, Rows
from dschat.planning.models import planned_models


def test_stages_of_a_pipeline_have_their_layers_and_ranks_of_data_alone():
    flags = ("--pipeline_parallel_size=2", "--zero_stage=1")
    whole, half = (planned(arguments("sft", *more), ranks=4).phases["train"] for more in ((), flags))
    assert size(half, "weights") == size(whole, "weights") / 2
    # two averages and a copy for ZeRO of half the weights, over two ranks of data
    assert size(half, "optimiser") == pytest.approx(3 * size(half, "weights") / 2)
    assert size(half, "activations") == size(whole, "activations")


def test_tensor_ranks_share_linear_layers_and_nothing_else():
    whole, half = (
        size(planned(arguments("sft", *more), ranks=2).phases["train"], "weights")
        for more in ((), ("--tensor_parallel_size=2",))
    )
    # queries and outputs, keys and values of half as many heads, and the MLP, of 2 layers in fp32
    linear = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) * 4
    assert half == whole - linear / 2
    # On a CPU the pages of the file stay too: of columns a rank's half, of rows all.
    on_cpu = planned(arguments("sft", "--tensor_parallel_size=2"), device="cpu", ranks=2).phases["train"]
    assert size(on_cpu, "weights") == half + 0.75 * linear


def test_a_gpu_holds_its_shard_from_the_start_at_stage_3():
    whole, shard = (planned(arguments("sft", f"--zero_stage={n}"), ranks=4).phases["load"] for n in (2, 3))
    assert size(shard, "weights") < 0.6 * size(whole, "weights")


ROWS = Rows(2, 10, 10)
TOKENS, BIG = Block(8.0, 1), Block(LARGE / 20, 1)
"""Of 160 bytes, and of just what the heap does not grow for."""


def shape(kept: int, freed: int, *, big: int = 0) -> PassShape:
    """A pass that keeps so many small blocks, and frees others; it keeps `big` ones too."""
    saved = Counter({TOKENS: kept, BIG: big})
    return PassShape(
        saved=saved, layer=Counter(), moments=(Counter(), Counter()), logits=None, num_layers=2,
        allocated=saved + Counter({TOKENS: freed}), allocated_layer=Counter(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("blocks", "accumulation", "left"),
    [
        # three blocks were kept, and of two that were freed one is no room for the next
        (shape(3, 2), 1, 3 + 1),
        # large blocks take the room of as many bytes as small ones need
        (shape(3, 2, big=1), 1, 6 + 1),
        # the second micro-batch finds room in half of what the first left
        (shape(3, 2), 2, 4 + 2),
    ],
)
def test_on_a_cpu_the_heap_keeps_small_blocks_of_a_pass(blocks, accumulation, left):
    model = SimpleNamespace(spec=SimpleNamespace(name="model"), shape=lambda rows, *, trains: blocks)
    sizes = PassSizes(train_rows=2, train_rows_flag="", length=10, accumulation=accumulation)
    planner = MemoryModel([model], sizes, Hardware(device="cpu"), data_ranks=1)
    assert total(planner._left(model, ROWS)) == 160 * left


def test_large_blocks_leave_nothing_and_a_gpu_has_no_such_heap(monkeypatch):
    on_cpu, on_gpu = (planned(arguments("sft"), device=kind).phases["train"] for kind in ("cpu", "cuda"))
    assert size(on_cpu, "heap") > 0 == size(on_gpu, "heap")
    assert size(on_cpu, "activations") == size(on_gpu, "activations")
    monkeypatch.setattr(memory, "LARGE", 0)
    assert size(planned(arguments("sft"), device="cpu").phases["train"], "heap") == 0


def test_adapters_need_little_beside_weights():
    whole = planned(arguments("sft")).phases["train"]
    adapted = planned(arguments("sft", "--lora_dim=2", "--only_optimize_lora")).phases["train"]
    assert size(adapted, "optimiser") < 0.2 * size(whole, "optimiser")
    assert size(adapted, "weights") > size(whole, "weights")


def test_checkpointing_keeps_less_and_its_passes_without_gradients_cost_the_same():
    keeps, recomputes = (
        planned(arguments("rlhf", *flags)).phases
        for flags in ((), ("--actor_gradient_checkpointing", "--critic_gradient_checkpointing"))
    )
    assert total(recomputes["train"]) < total(keeps["train"])
    assert recomputes["experience"] == keeps["experience"]


def test_step_3_has_four_models_and_generates():
    phases = planned(arguments("rlhf")).phases
    assert {part.model for part in phases["experience"]} >= {
        *("actor", "critic", "reference model", "reward model"),
    }
    cache = size(phases["generate"], "KV cache")
    # 16 answers of 512 columns, 2 layers, keys and values of 2 heads of 8 numbers in fp32
    assert cache == 16 * 512 * 2 * 2 * 2 * 8 * 4
    assert set(phases) == {"load", "generate", "experience", "train", "save"}


def test_an_actor_of_adapters_alone_has_no_reference():
    phases = planned(arguments("rlhf", "--actor_lora_dim=2", "--only_optimize_lora")).phases
    assert "reference model" not in {part.model for part in phases["experience"]}


def test_a_gathered_actor_is_whole_while_it_generates():
    phases = planned(arguments("rlhf", "--actor_zero_stage=3", "--critic_zero_stage=3"), ranks=8).phases
    whole = planned(arguments("rlhf"), ranks=8).phases["generate"]
    assert size(phases["generate"], "gathered weights", "actor") == size(whole, "weights", "actor")


def test_an_actor_that_may_not_be_gathered_or_has_no_room_generates_layer_by_layer(monkeypatch):
    monkeypatch.setattr(engine_memory, "LIVE", 1000)
    monkeypatch.setattr(engine_memory, "PREFETCHED", 100)
    flags = ("--actor_zero_stage=3", "--critic_zero_stage=3")

    def gathered(*more: str, memory: float = 0.0) -> float:
        plan = planned(arguments("rlhf", *flags, *more), ranks=8, memory=memory)
        return size(plan.phases["generate"], "gathered weights", "actor")

    whole, tight = gathered(), 0.6e9 + 1000
    assert gathered("--rollout_gather=never") == gathered(memory=tight) != whole
    assert gathered("--enable_hybrid_engine", "--unpin_actor_parameters") == gathered(memory=tight)
    assert gathered("--rollout_gather=always", memory=tight) == whole


def test_frozen_models_rest_on_the_host_between_uses():
    phases = planned(arguments("rlhf", "--offload_reference_model")).phases
    there = [part for part in phases["train"] if part.model == "reference model" and part.kind == "weights"]
    assert [part.on_host for part in there] == [True]


def test_dpos_reference_is_gone_before_the_policy_comes():
    phases = planned(arguments("dpo")).phases
    assert {part.model for part in phases["train"] if part.kind == "weights"} == {"model"}
    assert {part.model for part in phases["experience"] if part.kind == "weights"} == {"reference model"}


def test_a_gpu_keeps_small_caches_between_rollouts():
    def caches(**options) -> list[float]:
        phases = planned(arguments("rlhf"), **options).phases
        return [size(phases[name], "KV cache") for name in ("generate", "experience", "train")]

    needed, *others = caches()
    assert others == [needed, needed]
    assert caches(memory=10 * needed) == [needed] * 3
    assert caches(memory=9 * needed) == [needed, 0, 0]
    assert caches(device="cpu") == [needed, 0, 0]
    assert size(planned(arguments("sft")).phases["train"], "KV cache") == 0


def test_small_weights_that_are_gathered_over_ranks_split_the_heap_of_a_cpu():
    args = arguments("rlhf", "--actor_zero_stage=3", "--critic_zero_stage=3")
    actor, _, critic, _ = planned_models(specs_of(args), only_adapters=False, configs=CONFIGS)
    actors, critics = (model.counts.small * model.element for model in (actor, critic))
    assert min(actors, critics) > 0

    def split(*flags: str, **options) -> float:
        phase = planned(arguments("rlhf", *flags), **{"device": "cpu", **options}).phases["train"]
        return size(phase, "heap", "ZeRO-3")

    both = ("--actor_zero_stage=3", "--critic_zero_stage=3")
    found = split(*both, ranks=2)
    # the actor for answers and to learn, the critic to learn, and what Gloo's threads copy
    assert found == pytest.approx((1 - REUSED) * (2 * actors + critics) + max(actors, critics))
    assert split("--critic_zero_stage=3", ranks=2) == pytest.approx((1 - REUSED) * critics + critics)
    assert split(ranks=2) == split(*both) == split(*both, ranks=2, device="cuda") == 0
