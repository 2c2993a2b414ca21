"""The flags of the forecast before PPO."""

import pytest
from step_flags import assert_refused, rlhf


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--forecast", "--gold_function 'a.py:f"], ["--forecast", "cannot be split into flags"]),
        (
            ["--forecast", "a.py:f"],
            ["--forecast 'a.py:f' has no flag", "--gold_function check.py:right", "none"],
        ),
        (["--forecast="], ["--forecast '' has no flag"]),
    ],
)
def test_what_is_no_forecast_is_refused(argv, parts):
    assert_refused(argv, parts)


def test_a_forecast_is_flags_in_one_string_or_none():
    asked = rlhf("--forecast", "--gold_function 'my checks.py:f' --num_answers 8").forecast
    assert asked.words == ["--gold_function", "my checks.py:f", "--num_answers", "8"]
    assert rlhf("--forecast", "none").forecast.words == rlhf().forecast.words == []
