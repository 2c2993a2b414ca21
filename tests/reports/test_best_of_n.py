"""Best-of-n without bias, and what is said of a reward model that is good, exploitable or blind."""

import itertools
import math

import numpy as np
import pytest

from dschat.reports.best_of_n import SIZES, best_of_n, forecast, kl_of


def test_the_estimate_is_the_mean_over_all_sets_of_answers():
    random = np.random.default_rng(0)
    scores, gold = random.normal(size=(3, 6)), random.normal(size=(3, 6))
    found = best_of_n(scores, gold, (1, 2, 4, 6))
    for place, n in enumerate((1, 2, 4, 6)):
        for row in range(3):
            sets = list(itertools.combinations(range(6), n))
            brute = sum(gold[row, max(s, key=lambda i: scores[row, i])] for s in sets) / len(sets)
            assert found[row, place] == pytest.approx(brute)


def test_of_answers_with_one_score_any_may_be_taken():
    # All sets of 2 of 3 answers with scores 1, 2, 2: two have one of the last two, one has both.
    found = best_of_n(np.array([[2.0, 1.0, 2.0]]), np.array([[1.0, 5.0, 0.0]]), (2,))
    assert found[0, 0] == pytest.approx((1.0 + 0.0 + 0.5) / 3)


def test_the_kl_of_best_of_n_is_that_of_the_order_statistic():
    # Of a continuous score with ranks u in (0, 1) the best of n has the density n u^(n-1): its KL to the
    # uniform is the integral of n u^(n-1) ln(n u^(n-1)), here by the midpoint rule.
    u = (np.arange(200_000) + 0.5) / 200_000
    for n in (1, 4, 64):
        density = n * u ** (n - 1)
        logs = math.log(n) + (n - 1) * np.log(u)
        assert kl_of(n) == pytest.approx((density * logs).mean(), abs=1e-4)
    assert kl_of(64) == pytest.approx(math.log(64) - 63 / 64)


def answers(correlation: float, turn: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores and gold of 150 prompts with 64 answers; with `turn` gold falls where scores are high."""
    random = np.random.default_rng(1)
    scores = random.normal(size=(150, 64))
    gold = correlation * scores + random.normal(size=scores.shape)
    return scores, gold - turn * np.maximum(scores - 1, 0)


def told(scores: np.ndarray, gold: np.ndarray):
    sizes = [n for n in SIZES if n <= scores.shape[1]]
    return forecast(sizes, best_of_n(scores, scores, sizes), best_of_n(scores, gold, sizes))


def test_a_good_reward_model_is_worth_it_and_gold_does_not_turn():
    scores, gold = answers(0.7)
    found = told(scores, gold)
    assert found.is_worth_it
    assert not found.turns
    # The best of 64 standard normal scores is 2.388 on average (tables of order statistics).
    assert found.points[-1].score.value == pytest.approx(2.388, abs=0.1)
    assert found.points[-1].gain.low < 0.7 * 2.388 < found.points[-1].gain.high
    assert found.max_kl == pytest.approx(kl_of(64))
    assert found.verdict.startswith("worth PPO: by best-of-n gold gains ")
    assert "has not turned" in found.verdict


def test_an_exploitable_one_is_worth_it_up_to_where_gold_turns():
    scores, gold = answers(0.8, turn=2.5)  # gold rises up to a score of 1, the best of about 3
    found = told(scores, gold)
    assert found.is_worth_it
    assert found.turns
    assert found.turning_kl.low <= kl_of(3) <= found.turning_kl.high + 0.2
    assert found.kl_target <= found.peak.kl < found.max_kl <= 1.5 * found.peak.kl
    low, high = found.turning_kl.low, found.turning_kl.high
    assert (
        f"and falls from KL {found.peak.kl:.2f} ({low:.2f} to {high:.2f}) on (PPO may turn elsewhere)"
        in found.verdict
    )


def test_one_that_is_worse_than_chance_is_not_worth_ppo():
    scores, gold = answers(-0.5)
    found = told(scores, gold)
    assert not found.is_worth_it
    assert (found.kl_target, found.max_kl, found.peak.n) == (None, None, 1)
    assert found.verdict == "this reward model is not worth PPO: gold falls from KL 0.00 on"


def test_a_blind_one_gains_nothing_beyond_noise():
    scores, _ = answers(0)
    gold = np.random.default_rng(5).normal(size=scores.shape)
    found = told(scores, gold)
    assert not found.is_worth_it
    assert "gains nothing beyond noise" in found.verdict
