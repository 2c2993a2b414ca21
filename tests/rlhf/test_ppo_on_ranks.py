"""PPO gives the same numbers on any number of ranks, at any ZeRO stage, in any micro-batches."""

import json
from pathlib import Path

import pytest
from figures import TIMED
from processes import ROOT, python
from safetensors.torch import load_file

WORKER = ROOT / "tests" / "workers" / "ppo_steps.py"
STAGES = [(actor, critic) for actor in range(4) for critic in range(4)]
BF16_STAGES = [(0, 0), (1, 2), (2, 1), (3, 3)]
# Eight answers a PPO step, in two optimiser steps, passed twice.
COMMON = {"ppo_epochs": 2, "enable_ema": True}
ONE_RANK = {**COMMON, "per_device_generation_batch_size": 8, "per_device_training_batch_size": 4}
TWO_RANKS = {**COMMON, "per_device_generation_batch_size": 4, "per_device_training_batch_size": 2}
BF16 = {"dtype": "bf16", "rollout_backend": "hf"}
"""One way to generate at every ZeRO stage: ways that round otherwise draw other tokens here and there."""


def run(models: Path, settings: list[dict], *, ranks: int) -> list[dict]:
    output = models / f"results_of_{ranks}.json"
    python(WORKER, models, output, json.dumps(settings), ranks=ranks, timeout=900)
    return json.loads(output.read_text())


def assert_same(actual: dict, expected: dict, *, tolerance: float, answers: bool = True) -> None:
    for step, (ours, theirs) in enumerate(zip(actual["steps"], expected["steps"], strict=True)):
        if answers:
            assert ours["answers"] == theirs["answers"], f"answers of PPO step {step}"
        compared = [n for n in theirs if n != "answers" and not n.startswith(TIMED)]
        assert len(compared) > 20
        for name in compared:
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), (
                f"{name} of step {step}"
            )
    for name, weights in expected["weights"].items():
        assert actual["weights"][name] == pytest.approx(weights, rel=tolerance), f"weights of {name}"


@pytest.fixture(scope="module")
def one_rank(models) -> dict:
    settings = {"fp32": {"dtype": "fp32"}, "bf16": BF16}
    settings["in two generation batches"] = {
        "dtype": "fp32",
        "per_device_generation_batch_size": 4,
        "generation_batches": 2,
    }
    settings["in micro-batches of one"] = {
        "dtype": "fp32",
        "per_device_training_batch_size": 1,
        "gradient_accumulation_steps": 4,
    }
    settings["with gradient checkpointing"] = {
        "dtype": "fp32",
        "actor_gradient_checkpointing": True,
        "critic_gradient_checkpointing": True,
    }
    settings["from continuous batching"] = {"dtype": "fp32", "rollout_backend": "continuous"}
    results = run(models, [{**ONE_RANK, **s} for s in settings.values()], ranks=1)
    return dict(zip(settings, results, strict=True))


@pytest.mark.slow
def test_before_the_first_update_ratio_is_one_and_kl_zero(one_rank):
    for name, result in one_rank.items():
        first, second = result["steps"]
        assert first["kl"] == 0, name
        assert first["k3"] == 0, name
        assert first["first_minibatch_ratio_error"] == 0, name
        assert second["first_minibatch_ratio_error"] == 0, name
        assert second["kl"] != 0, name
        assert first["approx_kl"] > 0, name  # the later optimiser steps


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("in two generation batches", "in micro-batches of one", "with gradient checkpointing"),
        "from continuous batching",
    ],
)
def test_numbers_do_not_change(name, one_rank):
    assert_same(one_rank[name], one_rank["fp32"], tolerance=1e-4)


@pytest.fixture(scope="module")
def two_ranks(models) -> dict:
    keys = [("fp32", *stages) for stages in STAGES] + [("bf16", *stages) for stages in BF16_STAGES]
    settings = [
        {
            **TWO_RANKS,
            **(BF16 if dtype == "bf16" else {"dtype": dtype}),
            "actor_zero_stage": actor,
            "critic_zero_stage": critic,
        }
        for dtype, actor, critic in keys
    ]
    layered = {**TWO_RANKS, "dtype": "fp32", "actor_zero_stage": 3, "rollout_gather": "never"}
    offloaded = {**TWO_RANKS, "dtype": "fp32", "actor_zero_stage": 2, "critic_zero_stage": 3, "offload": True}
    paged = {**TWO_RANKS, "dtype": "fp32", "actor_zero_stage": 3, "rollout_backend": "continuous"}
    copied = {**TWO_RANKS, "dtype": "fp32", "actor_zero_stage": 3, "critic_zero_stage": 3}
    copied["zero_hpz_partition_size"] = 2
    results = run(models, [*settings, layered, offloaded, paged, copied], ranks=2)
    return dict(zip([*keys, "layered", "offloaded", "paged", "second copies"], results, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("actor", "critic"), STAGES)
def test_two_ranks_at_any_zero_stage_give_the_numbers_of_one(actor, critic, one_rank, two_ranks):
    assert_same(two_ranks["fp32", actor, critic], one_rank["fp32"], tolerance=1e-4)


@pytest.mark.slow
def test_passes_with_gathered_weights_are_recorded_and_those_that_gather_are_not(two_ranks):
    assert [two_ranks["fp32", stage, 0]["decoding"] for stage in range(4)] == ["traced"] * 4
    assert two_ranks["layered"]["decoding"] == "matmul"


@pytest.mark.slow
@pytest.mark.parametrize(("actor", "critic"), BF16_STAGES)
def test_bf16_agrees_within_its_rounding(actor, critic, one_rank, two_ranks):
    first, expected = two_ranks["bf16", actor, critic]["steps"][0], one_rank["bf16"]["steps"][0]
    assert first["first_minibatch_ratio_error"] == 0
    assert first["kl"] == 0
    for name in ("score", "entropy", "return_mean", "value_loss"):
        assert first[name] == pytest.approx(expected[name], rel=0.05, abs=0.05), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layered", "offloaded", "paged", "second copies"])
def test_neither_layers_nor_offloading_nor_pages_nor_second_copies_change_anything(name, one_rank, two_ranks):
    assert_same(two_ranks[name], one_rank["fp32"], tolerance=1e-4)


ADAPTERS = {
    f"{model}_{name}": value
    for model in ("actor", "critic")
    for name, value in {"lora_dim": 4, "lora_learning_rate": 1e-2, "gradient_checkpointing": True}.items()
}
LORA = {
    "adapters alone": {**ADAPTERS, "only_optimize_lora": True},
    "adapters, embeddings and norms": ADAPTERS,
}
LORA_STAGES = [(0, 0), (3, 3), (2, 3)]


@pytest.fixture(scope="module")
def one_rank_with_lora(models) -> dict:
    results = run(models, [{**ONE_RANK, "dtype": "fp32", **settings} for settings in LORA.values()], ranks=1)
    return dict(zip(LORA, results, strict=True))


@pytest.fixture(scope="module")
def two_ranks_with_lora(models) -> dict:
    keys = [(name, "fp32", *stages) for name in LORA for stages in LORA_STAGES]
    keys += [("adapters alone", "bf16", 3, 2), ("adapters alone", "bf16", 0, 1)]
    settings = [
        {**TWO_RANKS, **LORA[name], "dtype": dtype, "actor_zero_stage": actor, "critic_zero_stage": critic}
        for name, dtype, actor, critic in keys
    ]
    layered = {**TWO_RANKS, **LORA["adapters alone"], "dtype": "fp32", "actor_zero_stage": 3}
    hybrid = {**TWO_RANKS, **LORA["adapters alone"], "dtype": "fp32", "enable_hybrid_engine": True}
    more = {
        "layered": {**layered, "rollout_gather": "never"},
        "hybrid 0": hybrid,
        "hybrid 3": {**hybrid, "actor_zero_stage": 3},
    }
    results = run(models, [*settings, *more.values()], ranks=2)
    return dict(zip([*keys, *more], results, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", LORA)
def test_adapters_begin_with_ratio_one_and_kl_zero_and_then_learn(name, one_rank_with_lora, one_rank):
    result = one_rank_with_lora[name]
    first, second = result["steps"]
    assert first["kl"] == first["k3"] == 0
    assert first["first_minibatch_ratio_error"] == second["first_minibatch_ratio_error"] == 0
    assert second["kl"] != 0
    assert first["answers"] == one_rank["fp32"]["steps"][0]["answers"]
    expected = {"actor", "critic", "ema"}
    assert result["weights"].keys() == expected | {f"{model} adapter" for model in expected}
    assert result["weights"]["actor"] != result["weights"]["ema"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LORA)
@pytest.mark.parametrize(("actor", "critic"), LORA_STAGES)
def test_adapters_on_two_ranks_give_the_numbers_of_one(
    name, actor, critic, one_rank_with_lora, two_ranks_with_lora
):
    actual = two_ranks_with_lora[name, "fp32", actor, critic]
    assert_same(actual, one_rank_with_lora[name], tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layered", "hybrid 0", "hybrid 3"])
def test_neither_adapters_gathered_by_layer_nor_a_hybrid_engine_change_anything(
    name, one_rank_with_lora, two_ranks_with_lora
):
    assert_same(two_ranks_with_lora[name], one_rank_with_lora["adapters alone"], tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("actor", "critic"), [(3, 2), (0, 1)])
def test_adapters_in_bf16_begin_with_ratio_one_and_kl_zero(actor, critic, two_ranks_with_lora):
    first, second = two_ranks_with_lora["adapters alone", "bf16", actor, critic]["steps"]
    assert first["kl"] == 0
    assert first["first_minibatch_ratio_error"] == second["first_minibatch_ratio_error"] == 0
    assert second["kl"] != 0


REFERENCES = ("shared", "copied")


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def actors_with_either_reference(models, request) -> dict:
    keys = [(stage, reference) for stage in range(4) for reference in REFERENCES]
    sizes = {1: ONE_RANK, 2: TWO_RANKS}[request.param]
    adapters = {"actor_lora_dim": 4, "actor_lora_learning_rate": 1e-2, "only_optimize_lora": True}
    settings = [
        {**sizes, **adapters, "dtype": "fp32", "actor_zero_stage": stage}
        | ({"copied_reference": True} if reference == "copied" else {})
        | {"offload_reference_model": (stage == 3) == (reference == "shared")}
        | {"offload_reward_model": reference == "copied"}
        for stage, reference in keys
    ]
    return dict(zip(keys, run(models, settings, ranks=request.param), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_an_actor_is_its_own_reference_as_well_as_a_copy_is(stage, actors_with_either_reference, models):
    shared, copied = (actors_with_either_reference[stage, reference] for reference in REFERENCES)
    assert (shared["has_copy"], copied["has_copy"]) == (False, True)
    first, second = shared["steps"]
    assert first["kl"] == first["k3"] == 0
    assert first["first_minibatch_ratio_error"] == second["first_minibatch_ratio_error"] == 0
    assert second["kl"] != 0
    assert_same(shared, copied, tolerance=1e-6)
    if stage < 3:  # there whole on every rank
        saved = copied["held_bytes"] - shared["held_bytes"]
        weights = load_file(models / "actor" / "model.safetensors")
        assert saved == sum(t.numel() * t.element_size() for t in weights.values())
