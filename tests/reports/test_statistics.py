"""Intervals, calibration and correlation against numbers made by hand and against simulation."""

import math

import numpy as np
import pytest

from dschat.reports.statistics import (
    agresti_coull,
    bootstrapped,
    calibration_curve,
    calibration_error,
    cautious_interval,
    correlation,
    lapse_rate,
    mean,
    rate,
    wilson,
)


def test_the_interval_of_a_mean_is_two_standard_errors_of_the_groups():
    values, groups = np.array([1.0, 1.0, 3.0, 3.0]), np.array([0, 0, 7, 7])
    # mean 2; residuals by group -2 and +2; sqrt(2 / 1 * (4 + 4)) / 4 = 1
    found = mean(values, groups)
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2 - 1.959964, 2 + 1.959964))
    # apart they are four observations: s = sqrt(4 / 3), s / 2
    alone = mean(values, np.arange(4))
    assert alone.high - 2 == pytest.approx(1.959964 * math.sqrt(4 / 3) / 2)


def test_a_win_rate_has_wilsons_interval():
    # 15 of 20: (0.75 + 3.8415/40) / (1 + 3.8415/20) = 0.7097, half width 0.1783 (Wilson 1927)
    found = wilson(0.75, 20)
    assert (found.low, found.high) == pytest.approx((0.5313, 0.8881), abs=2e-4)
    values = np.array([1.0] * 15 + [0.0] * 5)
    by_itself = rate(values, np.arange(20))  # s / sqrt(N) has N - 1: 19 independent ones
    assert (by_itself.low, by_itself.high) == pytest.approx((wilson(0.75, 19).low, wilson(0.75, 19).high))
    twice = rate(np.tile(values, 2), np.tile(np.arange(20), 2))  # the same said twice is no more sure
    assert (twice.low, twice.high) == pytest.approx((by_itself.low, by_itself.high))


def test_ties_are_halves_and_nothing_but_wins_is_not_certain():
    ties = rate(np.full(10, 0.5), np.arange(10))
    assert ties.low < 0.5 < ties.high
    wins = rate(np.ones(10), np.arange(10))
    assert wins.high == pytest.approx(1.0)
    assert wins.low == pytest.approx(0.7225, abs=1e-3)  # 10 of 10
    assert rate(np.ones(10), np.zeros(10, int)).low < 0.3  # of one prompt


def test_the_intervals_hold_the_truth_in_19_of_20_simulations():
    """Pairs of a prompt agree: an interval that takes them apart holds it less often."""
    random = np.random.default_rng(3)
    groups = np.repeat(np.arange(60), 4)
    held = {"rate": 0, "mean": 0, "bootstrap": 0, "apart": 0}
    for _ in range(200):
        chance = random.beta(2, 1, size=60)[groups]  # mean 2 / 3
        values = (random.random(240) < chance).astype(float)
        found = {
            "rate": rate(values, groups),
            "mean": mean(values, groups),
            "apart": rate(values, np.arange(240)),
        }
        for name, one in found.items():
            held[name] += one.low <= 2 / 3 <= one.high
    assert min(held["rate"], held["mean"]) >= 182
    assert held["apart"] < 178
    one = bootstrapped(lambda column: float(column.mean()), [values], groups)
    assert (one.low, one.high) == pytest.approx((found["mean"].low, found["mean"].high), abs=0.015)


def test_calibration_is_the_distance_of_confidence_and_share_in_bins():
    probabilities = np.array([0.52, 0.58, 0.93, 0.97])
    right = np.array([1.0, 0.0, 1.0, 1.0])
    bins = calibration_curve(probabilities, right, num_bins=5)  # [.5, .6), ..., [.9, 1]
    assert [(b.confidence, b.share, b.number) for b in bins] == [
        pytest.approx((0.55, 0.5, 2)),
        pytest.approx((0.95, 1.0, 2)),
    ]
    assert [list(b.rows) for b in bins] == [[0, 1], [2, 3]]
    assert calibration_error(probabilities, right, num_bins=5) == pytest.approx(0.05)
    assert calibration_curve(np.array([1.0]), np.array([1.0]))[0].number == 1  # the last bin holds 1


def test_correlation_by_hand_and_of_what_does_not_vary():
    # deviations (-1, 0, 1) and (-1, 1, 0): product 1, norms sqrt(2) each
    assert correlation(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])) == pytest.approx(0.5)
    assert math.isnan(correlation(np.ones(3), np.arange(3.0)))


def test_nothing_is_known_of_one_group():
    found = bootstrapped(lambda column: float(column.mean()), [np.arange(4.0)], np.zeros(4, int))
    assert found.value == 1.5
    assert math.isnan(found.low)
    several = mean(np.array([1.0, 1.0, 0.0]), np.zeros(3, dtype=int))
    assert (several.value, several.low != several.low) == (2 / 3, True)
    assert several.shown("+.1%") == "+66.7% (interval unknown)"


def test_the_interval_of_agresti_and_coull_by_hand():
    # of 16 of 20 with z = 2: 18 / 24, and 2 sqrt(0.75 x 0.25 / 24) = 0.1768; s / sqrt(20) has 19, so by that
    values = np.array([1.0] * 16 + [0.0] * 4)
    assert cautious_interval(0.8, math.sqrt(0.8 * 0.2 / 20), 20, 20) == pytest.approx(
        (0.5732, 0.9268), abs=1e-4
    )
    found = agresti_coull(values, np.arange(20))  # (15.2 + 2) / 23 and 2 sqrt(0.7478 x 0.2522 / 23) = 0.1811
    assert (found.low, found.high) == pytest.approx((0.5667, 0.9289), abs=1e-4)


@pytest.mark.parametrize("noise", [0.0, 0.15, 0.3])
def test_the_lapse_rate_finds_the_labels_that_were_turned_round(noise):
    random = np.random.default_rng(5)
    lead = random.normal(size=3000) * 3
    right = random.random(3000) < 1 / (1 + np.exp(-2 * lead))
    turned = random.random(3000) < noise
    lead = np.where(right ^ turned, lead, -lead)
    found = lapse_rate(lead, np.arange(3000))
    assert found.low <= noise <= found.high
    assert found.value == pytest.approx(noise, abs=0.03)
    assert found.high - found.low < 0.1


def test_a_weak_model_tells_little_of_the_labels():
    random = np.random.default_rng(5)
    lead = random.normal(size=300) + 0.2
    found = lapse_rate(lead, np.arange(300))
    assert found.high - found.low > 0.3
    assert math.isnan(lapse_rate(np.zeros(10), np.arange(10)).value)
