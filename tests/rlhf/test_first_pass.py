"""One pass for analysis and update of a micro-batch: exactly the numbers of two passes."""

import pytest
from test_ppo_on_ranks import TIMED, run
from test_ppo_options_on_ranks import LOSS_TERMS, flags

# Eight answers a PPO step in one optimiser step, passed twice over.
ONE_RANK = {
    "ppo_epochs": 2,
    "enable_ema": True,
    "per_device_generation_batch_size": 8,
    "per_device_training_batch_size": 8,
}
HALF = {"per_device_generation_batch_size": 4, "per_device_training_batch_size": 4}
TEXT = {"unsupervised_dataset_name": "text.txt", "max_prompt_seq_len": 20}
ADAPTERS = {"actor_lora_dim": 4, "critic_lora_dim": 4, "only_optimize_lora": True}
CHECKPOINTING = {"actor_gradient_checkpointing": True, "critic_gradient_checkpointing": True}
FAULTY_CACHE = {"skewed_cache": 1.3, "rollout_on_mismatch": "uncached"}
# The flags, the ranks, and how many passes of actor and critic two PPO steps save.
OPTIONS = {
    "plain": ({}, 1, (2, 2)),
    "of the actor alone": ({"reuse_first_pass": "actor"}, 1, (2, 0)),
    "bf16": ({"dtype": "bf16"}, 1, (2, 2)),
    "every term of the loss": (LOSS_TERMS, 1, (2, 2)),
    "text": (TEXT, 1, (2, 2)),
    "adapters alone": (ADAPTERS, 1, (2, 2)),
    "recomputed": (CHECKPOINTING, 1, (2, 2)),
    "critic warm-up": ({"critic_warmup_steps": 1}, 1, (1, 2)),
    "rloo": ({"advantage_estimator": "rloo", "num_samples_per_prompt": 2}, 1, (2, None)),
    "several optimiser steps": ({"per_device_training_batch_size": 2}, 1, (2, 2)),
    "several micro-batches": (
        {"per_device_training_batch_size": 2, "gradient_accumulation_steps": 4},
        1,
        (2, 2),
    ),
    "sampled again": (FAULTY_CACHE, 1, (2, 2)),
    "zero 1 and 2": (HALF | {"actor_zero_stage": 1, "critic_zero_stage": 2}, 2, (2, 2)),
    "zero 2 and 3, bf16": (
        HALF | {"actor_zero_stage": 2, "critic_zero_stage": 3, "dtype": "bf16"},
        2,
        (2, 2),
    ),
    "zero 3, text": (HALF | TEXT | {"actor_zero_stage": 3, "critic_zero_stage": 3}, 2, (2, 2)),
    "zero 3, adapters, recomputed": (
        HALF | ADAPTERS | CHECKPOINTING | {"actor_zero_stage": 3, "critic_zero_stage": 3},
        2,
        (2, 2),
    ),
}
RANKS = [1, 2]


@pytest.fixture(scope="module", params=RANKS, ids=["one rank", "two ranks"])
def results(models, request) -> dict:
    """Those of each option with one first pass and with two."""
    named = {name: options for name, (options, ranks, _) in OPTIONS.items() if ranks == request.param}
    settings = [
        {**ONE_RANK, "dtype": "fp32"} | flags(models, options) | {"reuse_first_pass": kept}
        for options in named.values()
        for kept in (options.get("reuse_first_pass", "both"), "none")
    ]
    outcomes = iter(run(models, settings, ranks=request.param))
    return {name: (next(outcomes), next(outcomes)) for name in named}


@pytest.mark.slow
def test_one_pass_gives_exactly_the_numbers_of_two(results):
    for name, (once, twice) in results.items():
        assert once["weights"] == twice["weights"], name
        for ours, theirs in zip(once["steps"], twice["steps"], strict=True):
            compared = [metric for metric in theirs if not metric.startswith(TIMED)]
            assert len(compared) > 15, name
            for metric in compared:
                assert ours[metric] == theirs[metric], f"{metric}, {name}"


@pytest.mark.slow
def test_each_ppo_step_saves_a_pass_of_each_model_that_learns(results):
    for name, (once, twice) in results.items():
        saved = [twice["passes"][model] - once["passes"].get(model) for model in twice["passes"]]
        assert saved == [number for number in OPTIONS[name][2] if number is not None], name
