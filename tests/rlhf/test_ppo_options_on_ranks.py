"""PPO's options in whole PPO steps: what they do, and the same numbers on one rank and two."""

from pathlib import Path

import pytest
from deepspeed.accelerator import get_accelerator
from test_ppo_on_ranks import ONE_RANK, TWO_RANKS, assert_same, run

LOSS_TERMS = {
    "kl_in": "loss",
    "kl_target": 0.05,
    "kl_horizon": 100,
    "entropy_coef": 0.01,
    "ratio_clip_high": 0.3,
    "dual_clip": 3,
}
MICRO_BATCHES_OF_ONE = {"per_device_training_batch_size": 1, "gradient_accumulation_steps": 4}
# Each with the ZeRO stages of actor and critic on two ranks.
OPTIONS = {
    "every term of the loss": (LOSS_TERMS, (3, 1)),
    "text": ({"unsupervised_dataset_name": "text.txt", "max_prompt_seq_len": 20}, (3, 3)),
    "text, recomputed": (
        {
            "unsupervised_dataset_name": "text.txt",
            "max_prompt_seq_len": 20,
            "actor_gradient_checkpointing": True,
        },
        (3, 3),
    ),
    "text without its weight": ({"unsupervised_dataset_name": "text.txt", "unsup_coef": 0}, (2, 2)),
    "plain": ({}, (0, 0)),
    "rloo": ({"advantage_estimator": "rloo", "num_samples_per_prompt": 2}, (2, 0)),
    "grpo": ({"advantage_estimator": "grpo", "num_samples_per_prompt": 4}, (3, 3)),
    "reinforce++": ({"advantage_estimator": "reinforce++"}, (0, 3)),
    "running score statistics": ({"score_normalization": "running", "reward_clip": 1}, (0, 0)),
    "critic warm-up": ({"critic_warmup_steps": 1, "kl_target": 1}, (2, 2)),
    "early stop": ({"target_approx_kl": 1e-3}, (1, 3)),
    "tis": ({"rollout_correction": "tis"}, (3, 0)),
    "tis with a faulty cache": (
        {"skewed_cache": 1.3, "rollout_on_mismatch": "warn", "rollout_correction": "tis", "tis_cap": 1.2},
        (3, 3),
    ),
    "a faulty cache left out": (
        {"skewed_cache": 1.3, "rollout_on_mismatch": "uncached", "rollout_gather": "never"},
        (3, 2),
    ),
    "no log-probabilities kept": ({"rollout_tolerance": 0}, (0, 0)),
}
STOPPED = {"skewed_cache": 1.3, "dtype": "fp32"}
# The critic's first gradients overflow at stage 3, the actor's do not.
FP16 = {"dtype": "fp16", "actor_zero_stage": 2, "critic_zero_stage": 3} | {
    "per_device_training_batch_size": 2,
    "gradient_accumulation_steps": 2,
}
HAS_FP16 = get_accelerator().is_fp16_supported()


def flags(models: Path, options: dict) -> dict:
    """The options, their text in a file of that folder."""
    if "unsupervised_dataset_name" not in options:
        return options
    text = models / "text.txt"
    text.write_text("".join(f"{n} bottles of water on the wall, {n} bottles.\n" for n in range(400)))
    return options | {"unsupervised_dataset_name": str(text), "data_output_path": str(models / "cache")}


@pytest.fixture(scope="module")
def one_rank(models) -> dict:
    options = {name: options for name, (options, _) in OPTIONS.items()}
    options["text in micro-batches of one"] = options["text"] | MICRO_BATCHES_OF_ONE
    options["every term in micro-batches of one"] = options["every term of the loss"] | MICRO_BATCHES_OF_ONE
    settings = [{**ONE_RANK, "dtype": "fp32"} | flags(models, chosen) for chosen in options.values()]
    settings.append(ONE_RANK | STOPPED)
    names = [*options, "stopped"]
    if HAS_FP16:
        settings += [ONE_RANK | FP16 | {"align_overflow": aligns} for aligns in (False, True)]
        names += ["fp16", "fp16, aligned"]
    return dict(zip(names, run(models, settings, ranks=1), strict=True))


@pytest.fixture(scope="module")
def two_ranks(models) -> dict:
    settings = [
        {**TWO_RANKS, "dtype": "fp32", "actor_zero_stage": actor, "critic_zero_stage": critic}
        | flags(models, options)
        for options, (actor, critic) in OPTIONS.values()
    ]
    settings.append(TWO_RANKS | STOPPED)
    return dict(zip([*OPTIONS, "stopped"], run(models, settings, ranks=2), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_two_ranks_give_the_numbers_of_one(name, one_rank, two_ranks):
    assert_same(two_ranks[name], one_rank[name], tolerance=1e-4)


@pytest.mark.slow
def test_two_ranks_stop_for_the_reason_of_one(one_rank, two_ranks):
    assert two_ranks["stopped"] == one_rank["stopped"]


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_the_first_ratio_stays_exactly_one(name, one_rank):
    errors = [step.get("first_minibatch_ratio_error", 0) for step in one_rank[name]["steps"]]
    assert errors == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("every term in micro-batches of one", "every term of the loss"),
        ("text in micro-batches of one", "text"),
        ("text, recomputed", "text"),
    ],
)
def test_micro_batches_and_recomputation_change_no_number(name, other, one_rank):
    assert_same(one_rank[name], one_rank[other], tolerance=1e-4)


@pytest.mark.slow
def test_kl_in_the_loss_is_reported_and_steers_beta(one_rank):
    first, second = one_rank["every term of the loss"]["steps"]
    assert first["kl"] == 0
    assert first["kl_loss"] > 0  # the later optimiser steps
    # 8 answers over a horizon of 100, KL 0: the error is clipped to -0.2
    assert first["kl_coef"] == 0.1
    assert second["kl_coef"] == pytest.approx(0.1 * (1 - 0.2 * 0.08))


@pytest.mark.slow
def test_text_is_learned_beside_the_answers(one_rank):
    first, second = one_rank["text"]["steps"]
    assert second["unsup_loss"] < first["unsup_loss"] < 7  # ln 384 is 5.95: it begins near an even guess
    assert one_rank["text"]["weights"]["actor"] != one_rank["plain"]["weights"]["actor"]


@pytest.mark.slow
def test_text_of_weight_zero_changes_nothing(one_rank):
    with_text, plain = one_rank["text without its weight"], one_rank["plain"]
    assert with_text["weights"] == pytest.approx(plain["weights"], rel=1e-12)
    assert "unsup_loss" in with_text["steps"][0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rloo", "grpo", "reinforce++"])
def test_without_a_critic_none_is_built_and_the_actor_learns(name, one_rank):
    result = one_rank[name]
    assert result["weights"].keys() == {"actor", "ema"}
    first, second = result["steps"]
    assert not [metric for metric in first if metric.startswith(("critic", "value"))]
    assert first["kl"] == 0
    assert second["kl"] != 0
    assert ("kl_loss" in first) == (name == "grpo")


@pytest.mark.slow
def test_the_answers_to_one_prompt_differ(one_rank):
    for step in one_rank["grpo"]["steps"]:
        first, second = step["answers"][:4], step["answers"][4:]
        assert len({tuple(answer) for answer in first}) > 1
        assert len({tuple(answer) for answer in second}) > 1


@pytest.mark.slow
def test_the_actor_waits_while_the_critic_learns(one_rank):
    first, second = one_rank["critic warm-up"]["steps"]
    assert "policy_loss" not in first
    assert "approx_kl" not in first
    assert first["value_loss"] > 0
    assert first["updates_done"] == second["updates_done"] == 4
    assert first["actor_lr"] == 1e-3  # the peak, as nothing is warmed up: the schedule has not begun
    assert second["actor_lr"] < first["actor_lr"]
    assert first["critic_lr"] < 1e-3
    assert second["kl_coef"] == 0.1
    assert second["kl"] == 0  # the policy that sampled the second time is still the reference
    assert second["approx_kl"] > 0


@pytest.mark.slow
def test_an_update_ends_after_the_step_that_moved_too_far(one_rank):
    for step in one_rank["early stop"]["steps"]:
        # The first optimiser step has approx_kl 0; the second is the first that can be above the target.
        assert step["updates_done"] == 2
        assert step["approx_kl"] > 1e-3 / 2  # the mean of the two


@pytest.mark.slow
def test_a_sound_cache_passes_and_its_weights_are_one_up_to_rounding(one_rank):
    for step in one_rank["tis"]["steps"]:
        assert 0 <= step["rollout_logprob_diff"] <= step["rollout_logprob_diff_max"] < 1e-5
        assert step["tis_weight_mean"] == pytest.approx(1, abs=1e-6)
        assert step["tis_truncated_share"] == 0
    assert_same(one_rank["tis"], one_rank["plain"], tolerance=1e-4)


@pytest.mark.slow
def test_a_faulty_cache_ends_the_run_with_both_numbers_and_the_remedies(one_rank):
    message = one_rank["stopped"]["error"]
    for part in ("differ by mean 0.", "at most ", "--rollout_tolerance lets a mean of 0.0001 pass",
                 "--rollout_on_mismatch uncached", "--rollout_correction tis"):  # fmt: skip
        assert part in message


@pytest.mark.slow
def test_without_the_faulty_cache_a_run_is_what_it_would_have_been(one_rank):
    assert_same(one_rank["a faulty cache left out"], one_rank["plain"], tolerance=1e-4)


@pytest.mark.slow
def test_a_run_that_goes_on_with_a_faulty_cache_weighs_its_tokens(one_rank):
    first, _ = one_rank["tis with a faulty cache"]["steps"]
    assert first["rollout_logprob_diff"] > 0.1
    assert 0 < first["tis_truncated_share"] < 1
    assert first["tis_weight_mean"] < 1.2
    assert first["answers"] != one_rank["plain"]["steps"][0]["answers"]


@pytest.mark.slow
def test_log_probabilities_are_kept_only_where_something_needs_them(one_rank):
    unchecked, plain = one_rank["no log-probabilities kept"]["steps"][0], one_rank["plain"]["steps"][0]
    assert plain.keys() - unchecked.keys() == {"rollout_logprob_diff", "rollout_logprob_diff_max"}


@pytest.mark.slow
@pytest.mark.skipif(not HAS_FP16, reason="this machine has no fp16")
def test_actor_and_critic_skip_the_same_steps_where_overflows_are_aligned(one_rank):
    apart, together = one_rank["fp16"]["steps"], one_rank["fp16, aligned"]["steps"]
    assert apart[0]["actor_lr"] < apart[0]["critic_lr"]  # it has taken more steps
    for step in together:
        assert step["actor_lr"] == step["critic_lr"]  # one peak, one schedule
        assert step["first_minibatch_ratio_error"] == 0
