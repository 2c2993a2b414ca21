"""What benchmarks/forecast.py calls a hit, of curves made by hand."""

import pytest

from benchmarks import forecast


def told(*gains: float, turning: tuple[float, float, float], turns: bool = True) -> dict:
    """A forecast whose gold gains so much at a KL of 0, 1, 2, ..., each within 0.1."""
    points = [
        {"kl": float(kl), "gain": {"value": gain, "low": gain - 0.1, "high": gain + 0.1}}
        for kl, gain in enumerate(gains)
    ]
    peak = {"gain": points[1]["gain"]}
    interval = dict(zip(("low", "value", "high"), turning, strict=True))
    about = {"verdict": "v", "kl_target": 1.0, "is_worth_it": True, "wall_seconds": 1.0}
    return {**about, "points": points, "peak": peak, "turning_kl": interval, "turns": turns}


def ppo(success: list[float], *, gain: float, kl: float) -> dict:
    """A run whose KL rises by 1 with each value, which stays for nine PPO steps; five are averaged."""
    curve = [
        {"step": 9 * n + i, "kl": float(n), "score": 0.0, "checked_success": value}
        for n, value in enumerate(success)
        for i in range(9)
    ]
    return {"curve": curve, "success": 0.3 + gain, "kl": kl, "seconds": 2.0}


def test_a_gain_between_two_points_is_on_the_line_and_beyond_them_the_last():
    points = told(0.0, 0.2, 0.1, turning=(1, 1, 1))["points"]
    assert [forecast.at(points, kl, "value") for kl in (0.0, 0.5, 1.5, 9.0)] == pytest.approx(
        [0, 0.1, 0.15, 0.1]
    )


def test_hits_and_misses_of_the_turn_and_the_gain():
    # Gold of PPO: 0.3, 0.5 at a KL of 1, 0.48 at 2, 0.3 at 3: its peak is at 1, within noise it reaches to 2.
    run = ppo([0.3, 0.5, 0.48, 0.3], gain=0.05, kl=1.0)
    found = forecast.compared(told(0.0, 0.2, 0.15, 0.1, turning=(1.0, 1.0, 1.5)), run, 0.3)
    assert found["ppo"]["peak_kl"] == 1.0
    assert found["ppo"]["near"] == pytest.approx([1.0, 2.2], abs=0.21)
    # 0.05 is below 0.2 - 0.1 - 0.04 = 0.06
    assert found["hits"] == {
        "worth": True, "turns": True, "turning KL": True, "within noise": True, "gain": False
    }  # fmt: skip
    later = forecast.compared(told(0.0, 0.2, 0.15, 0.1, turning=(1.8, 1.8, 2.0)), run, 0.3)
    assert (later["hits"]["turning KL"], later["hits"]["within noise"]) == (False, True)
    straight = forecast.compared(told(0.0, 0.1, 0.2, turning=(2, 2, 2), turns=False), run, 0.3)
    assert (straight["hits"]["turns"], straight["hits"]["turning KL"], straight["hits"]["gain"]) == (
        False,
        None,
        True,
    )
