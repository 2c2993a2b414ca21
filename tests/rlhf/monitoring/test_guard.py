"""The guard on hand-made figures: when it warns, when it stops a run, and what it leaves alone."""

import json
import math

import pytest

from dschat.arguments import GuardArguments
from dschat.rlhf.monitoring.guard import Guard

HEALTHY = {"score": 1.0, "kl": 0.5, "entropy": 2.0, "answer_length": 10.0, "eos_share": 0.9}


def guard_after(*changes: dict, patience: int = 3, kl_target: float | None = None, **flags) -> tuple:
    """A guard that saw one healthy PPO step and then one for each change, and what it said of each."""
    guard = Guard(GuardArguments(patience=patience, **flags), kl_target=kl_target)
    return guard, [guard.observe(step, HEALTHY | change) for step, change in enumerate(({}, *changes), 1)]


@pytest.mark.parametrize(
    ("name", "bad", "edge", "remedy"),
    [
        ("kl", {"kl": 2.51}, {"kl": 2.5}, "--kl_target"),  # 10 tokens x 0.25
        ("entropy", {"entropy": 0.19}, {"entropy": 0.2}, "--entropy_coef"),
        ("length", {"answer_length": 20.1}, {"answer_length": 20.0}, "--max_length_ratio"),
        ("end token", {"eos_share": 0.44}, {"eos_share": 0.45}, "--missing_eos_penalty"),
        ("non-finite", {"policy_loss": math.nan}, {"policy_loss": 1e9}, "--actor_learning_rate"),
    ],
)
def test_it_warns_at_first_sight_and_stops_after_patience(name, bad, edge, remedy):
    guard, said = guard_after(edge, bad, bad, bad)
    quiet, also_quiet, warning, silent, stop = said
    assert quiet == also_quiet == silent == []
    assert len(warning) == len(stop) == 1
    assert warning[0].startswith("guard: PPO step 3:")
    assert "after 3 PPO steps in a row of it the run stops" in warning[0]
    assert "the run stops after PPO step 5" in stop[0]
    assert remedy in warning[0]
    assert remedy in stop[0]
    assert guard.verdict() == {"stopped_by": name, "stop_reason": guard.reason}
    assert guard.reason in stop[0]


def test_the_numbers_seen_are_said():
    _, said = guard_after({"answer_length": 25.0, "kl": 12.5})
    assert "KL to the reference is 12.5 nats an answer, above --max_kl 2.5" in said[1][0]
    assert "answers have grown to 25 tokens from 10" in said[1][1]


def test_a_few_figures_that_are_not_finite_are_named():
    names = ("score", "kl", "entropy", "k3", "policy_loss")
    guard, said = guard_after(dict.fromkeys(names, math.nan))
    assert "guard: PPO step 2: score, kl, entropy and 2 more are not finite." in said[1][0]
    assert guard.is_warning


def test_a_recovery_is_said_and_resets_the_count():
    bad = {"kl": 9.0}
    guard, said = guard_after(bad, bad, {}, bad, bad)
    assert said[3] == ["guard: PPO step 4: kl is back within its limit."]
    assert guard.is_warning
    assert guard.stopped_by is None
    guard.observe(7, HEALTHY | bad)
    assert guard.stopped_by == "kl"


def test_different_sightings_do_not_add_up():
    guard, _ = guard_after({"kl": 9.0}, {"entropy": 0.0}, {"answer_length": 90.0}, {"kl": 9.0})
    assert guard.stopped_by is None


def test_without_patience_it_warns_only():
    guard, said = guard_after(*[{"kl": 9.0}] * 20, patience=0)
    assert guard.stopped_by is None
    assert guard.verdict() == {}
    assert sum(map(len, said)) == 1
    assert "it goes on" in said[1][0]


@pytest.mark.parametrize(
    ("flags", "limit"),
    [
        ({}, 2.5),
        ({"max_kl": 1.5}, 1.5),
        ({"kl_target": 2.0}, 6.0),
        ({"kl_target": 2.0, "max_kl": 1.5}, 1.5),
        ({"max_kl": math.inf}, math.inf),
    ],
)
def test_the_limit_of_kl(flags, limit):
    guard, _ = guard_after(**flags)
    assert guard.max_kl == limit


def test_the_limit_of_kl_grows_with_the_first_answers_only():
    guard = Guard(GuardArguments())
    guard.observe(1, HEALTHY | {"answer_length": 100.0})
    guard.observe(2, HEALTHY | {"answer_length": 400.0})
    assert guard.max_kl == 25.0


@pytest.mark.parametrize(
    ("flags", "figures"),
    [
        ({"max_kl": math.inf}, {"kl": 1e6}),
        ({"min_entropy_ratio": 0}, {"entropy": 0.0}),
        ({"max_length_ratio": math.inf}, {"answer_length": 1e6}),
        ({"min_eos_ratio": 0}, {"eos_share": 0.0}),
    ],
)
def test_each_limit_can_be_left_out(flags, figures):
    guard, said = guard_after(figures, **flags)
    assert said[1] == []
    assert not guard.is_warning


def test_a_model_that_never_ended_its_answers_is_not_blamed():
    guard = Guard(GuardArguments())
    guard.observe(1, HEALTHY | {"eos_share": 0.1})
    assert guard.observe(2, HEALTHY | {"eos_share": 0.0}) == []


def test_a_gradient_that_overflows_under_fp16_is_not_the_end():
    _, said = guard_after({"actor_grad_norm": math.inf})
    assert said[1] == []


def test_evaluations_are_compared_with_the_first_evaluation():
    guard = Guard(GuardArguments())
    assert guard.observe(0, {"eval_answer_length": 4.0}) == []
    assert guard.observe(1, HEALTHY) == []  # 10 tokens are more than twice 4, but of other prompts
    (message,) = guard.observe(2, HEALTHY | {"eval_answer_length": 8.1})
    assert "8.1 tokens from 4" in message


def evaluation(score: float, guard_score: float) -> dict:
    return {
        "eval_score": score,
        "eval_guard_score": guard_score,
        "eval_guard_score_stderr": 0.3,
    }


@pytest.mark.parametrize(
    ("score", "guard_score", "warns"),
    [
        (2.0, 0.10, True),  # fallen by 0.9, and 2 x 0.3 x sqrt 2 is 0.849
        (2.0, 0.20, False),
        (0.9, 0.10, False),  # the score fell too: no over-optimisation
        (2.0, 1.50, False),
    ],
)
def test_a_second_reward_model_that_disagrees_is_a_warning(score, guard_score, warns):
    guard = Guard(GuardArguments(patience=2))
    guard.observe(0, evaluation(1.0, 1.0))
    assert bool(guard.observe(10, HEALTHY | evaluation(score, guard_score))) == warns
    assert guard.wants_evaluation == warns


def test_between_evaluations_the_second_reward_model_neither_counts_nor_recovers():
    guard = Guard(GuardArguments(patience=2))
    guard.observe(0, evaluation(1.0, 1.0))
    guard.observe(10, HEALTHY | evaluation(2.0, -1.0))
    assert guard.observe(11, HEALTHY) == []
    assert guard.is_warning
    guard.observe(12, HEALTHY | evaluation(2.0, -1.0))
    assert guard.stopped_by == "second reward model"


def test_it_goes_on_from_its_state_as_json():
    bad = {"kl": 9.0}
    guard, _ = guard_after(bad, bad)
    again = Guard(GuardArguments(patience=3))
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    again.observe(4, HEALTHY | bad)
    assert again.stopped_by == "kl"
    assert "initial" in again.state_dict()
