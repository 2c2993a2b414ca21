"""The verdict on a reward model, of numbers made by hand."""

import math

import pytest

from dschat.export.verdict import GOOD, Evaluation, accuracy_interval, is_good, reward_verdict


def evaluated(
    accuracy: float,
    num_pairs: int,
    *,
    step: int = 10,
    loss: float = 0.6,
    train_loss: float = 0.5,
    num_prompts: int | None = None,
    accuracy_stderr: float | None = None,
    gain: float = 0.1,
    overconfidence: float = 0.0,
) -> Evaluation:
    """An evaluation of a pair a prompt, its standard error that of so many draws."""
    error = math.sqrt(accuracy * (1 - accuracy) / num_pairs) if accuracy_stderr is None else accuracy_stderr
    figures = {
        "eval_accuracy": accuracy,
        "eval_accuracy_stderr": error,
        "eval_pairs": num_pairs,
        "eval_prompts": num_prompts or num_pairs,
        **{"eval_gain_over_length": gain, "eval_gain_over_length_stderr": 0.02},
        **{"eval_overconfidence": overconfidence, "eval_overconfidence_stderr": 0.01},
    }
    return Evaluation(step, figures, loss, train_loss if step else None)


def words(*evaluations: Evaluation) -> str:
    return reward_verdict(evaluations).partition(":")[0]


# Agresti and Coull with z = 2: two right and two wrong ones are added. Of 16 of 20: 18 / 24 = 0.75, and
# 2 sqrt(0.75 x 0.25 / 24) = 0.1768. Of 3 of 3: 5 / 7, and 2 sqrt(5 / 7 x 2 / 7 / 7) = 0.3415.
@pytest.mark.parametrize(
    ("accuracy", "num_pairs", "interval"),
    [
        (0.8, 20, (0.5732, 0.9268)),
        (1.0, 3, (0.3728, 1.0)),
        (0.0, 3, (0.0, 0.6272)),
        (0.5, 4, (0.1464, 0.8536)),
    ],
)
def test_the_interval_by_hand(accuracy, num_pairs, interval):
    assert accuracy_interval(evaluated(accuracy, num_pairs)) == pytest.approx(interval, abs=1e-4)


@pytest.mark.parametrize(
    ("accuracy", "num_pairs", "verdict"),
    [
        (0.70, 1000, GOOD),
        (0.80, 20, GOOD),
        (1.00, 10, GOOD),
        (1.00, 4, "too few pairs to say"),
        (0.00, 3, "too few pairs to say"),
        (1.00, 1, "too few pairs to say"),
        (0.55, 100, "too few pairs to say"),
        (0.50, 10, "too few pairs to say"),
        (0.50, 1000, "no better than chance"),
        (0.53, 200, "no better than chance"),
        (0.35, 20, "no better than chance"),  # 9 / 24 + 2 sqrt(0.375 x 0.625 / 24) = 0.573
        (0.30, 100, "worse than chance"),
        (0.00, 20, "worse than chance"),
    ],
)
def test_the_words_for_an_accuracy(accuracy, num_pairs, verdict):
    assert words(evaluated(0.5, num_pairs, step=0, loss=0.7), evaluated(accuracy, num_pairs)) == verdict


@pytest.mark.parametrize(
    ("settings", "verdict", "number"),
    [
        (
            {"gain": -0.01},
            "no better than length",
            "-0.010 (-0.049 to +0.029) against the rule of length",
        ),
        (
            {"gain": 0.005},
            "no better than length",
            "+0.005",
        ),  # below 0.05 at most: 0.005 + 1.96 x 0.02 = 0.044
        ({"gain": 0.02}, "too few pairs to tell it from length", "(-0.019 to +0.059)"),
        (
            {"overconfidence": 0.05},
            "overconfident",
            "the mean probability is +0.050 (+0.030 to +0.070) above",
        ),
        ({"gain": -0.01, "overconfidence": 0.05}, "no better than length, overconfident", "-0.010"),
    ],
)
def test_the_words_of_the_report_are_those_of_the_step(settings, verdict, number):
    told = reward_verdict([evaluated(0.7, 1000, **settings)])
    assert told.startswith(f"{verdict}: 0.700 +- 0.014 of 1000 held-out pairs")
    assert number in told
    assert not is_good(told)


def test_many_pairs_of_few_prompts_count_as_few():
    alike = evaluated(0.6, 400, num_prompts=8, accuracy_stderr=0.15)
    assert words(alike) == "too few pairs to say"
    assert "of 400 held-out pairs of 8 prompts" in reward_verdict([alike])
    assert words(evaluated(1.0, 400, num_prompts=3)) == "too few pairs to say"
    assert words(evaluated(0.6, 400)) == GOOD


START = evaluated(0.5, 100, step=0, loss=0.7)


def test_a_loss_that_rises_while_that_of_training_falls_is_overfitting():
    best, last = (
        evaluated(0.7, 100, step=10, loss=0.6),
        evaluated(0.7, 100, step=20, loss=0.9, train_loss=0.1),
    )
    assert words(START, best, last) == f"{GOOD}, overfitted"
    told = reward_verdict([START, best, last])
    assert "evaluation loss rose from 0.600 at step 10 to 0.900 at step 20" in told
    assert "training loss fell to 0.100" in told
    assert not is_good(told)
    assert is_good(reward_verdict([START, best]))


def test_the_case_of_a_small_set_that_got_no_verdict():
    """Accuracy 0.35 +- 0.11 and a rising evaluation loss."""
    start, last = (
        evaluated(0.5, 20, step=0, loss=0.71),
        evaluated(0.35, 20, step=5, loss=0.95, train_loss=0.6),
    )
    told = reward_verdict([start, last])
    assert told.startswith("no better than chance, overfitted: 0.350 +- 0.107 of 20 held-out pairs")
    assert "rose from 0.710 at the start to 0.950 at step 5" in told


@pytest.mark.parametrize(
    "last",
    [
        evaluated(0.7, 100, step=20, loss=0.62, train_loss=0.1),  # within 5 % of the lowest
        evaluated(0.7, 100, step=20, loss=0.9, train_loss=0.8),  # nothing was learned by heart
        evaluated(0.7, 100, step=20, loss=0.5, train_loss=0.1),
    ],
)
def test_what_is_no_overfitting(last):
    assert words(START, evaluated(0.7, 100, step=10, loss=0.6), last) == GOOD


def test_without_held_out_pairs_that_is_said():
    told = reward_verdict([])
    assert told.startswith("not evaluated: no pairs were held out (--eval_fraction")
    assert not is_good(told)


def test_a_loss_that_is_not_finite_is_said_and_is_no_lowest_one():
    broken = evaluated(0.5, 100, step=10, loss=math.nan)
    assert words(START, broken) == "not finite"
    assert words(START, broken, evaluated(0.7, 100, step=20, loss=0.6)) == GOOD
