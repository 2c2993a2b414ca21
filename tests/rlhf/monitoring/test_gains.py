"""Gains of one policy over another, of numbers made by hand."""

import math

import pytest

from dschat.rlhf.monitoring.gains import Answers, did_it_help, gain, gained_objective, gained_score


def answers(*objectives: float, prompts: tuple[int, ...] | None = None) -> Answers:
    """Scores are one more."""
    return Answers(prompts or tuple(range(len(objectives))), [o + 1 for o in objectives], list(objectives))


def test_a_gain_is_the_mean_difference_and_its_error_that_of_pairs():
    # Differences 1, 2, 3, 6: mean 3, sample standard deviation sqrt(14 / 3), error that over sqrt 4.
    found = gain([5.0, 0.0, -9.0, 2.0], [6.0, 2.0, -6.0, 8.0], [0, 1, 2, 3])
    assert (found.mean, found.stderr) == (3, pytest.approx(math.sqrt(14 / 3) / 2))
    # That of the values themselves is far larger: pairing takes the differences between prompts out.
    assert found.is_beyond_noise


def test_answers_to_one_prompt_count_once():
    # Two prompts of differences 1, 1 and 3, 3: as two of 1 and 3, mean 2 and error sqrt(2) / sqrt(2) = 1.
    found = gain([0.0] * 4, [1.0, 1.0, 3.0, 3.0], [7, 7, 8, 8])
    assert (found.mean, found.stderr) == (2, pytest.approx(1))


@pytest.mark.parametrize(
    ("after", "prompts", "beyond"),
    [
        ([1.0, 1.0, 1.0], (0, 1, 2), True),  # no noise at all
        ([-1.0, -1.0, -1.0], (0, 1, 2), True),
        ([3.0, 0.0, -3.0], (0, 1, 2), False),
        ([3.0, 3.0, -3.0], (0, 1, 2), False),  # mean 1, error sqrt(12) / sqrt(3) = 2
        ([0.0, 0.0, 0.0], (0, 1, 2), False),
        ([9.0, 9.0, 9.0], (5, 5, 5), False),  # one prompt
        ([9.0], (0,), False),
        ([math.nan, 1.0, 1.0], (0, 1, 2), False),
    ],
)
def test_what_is_beyond_noise(after, prompts, beyond):
    assert gain([0.0] * len(after), after, prompts).is_beyond_noise == beyond


def test_gains_of_score_and_of_the_objective_are_told_apart():
    start, after = answers(0.0, 0.0), Answers((0, 1), [5.0, 5.0], [1.0, 1.0])
    assert gained_score(start, after).mean == 4
    assert gained_objective(start, after).mean == 1


# Differences 1, 2, 3: mean 2, error 1 / sqrt(3) = 0.577, 3.5 of them. 0, 1, 2: mean 1, 1.7 of them.
@pytest.mark.parametrize(
    ("after", "words"),
    [
        (
            (1.0, 2.0, 3.0),
            "better than the start: score +2 +- 0.58, score - beta KL +2 +- 0.58 (3 answers to 3",
        ),
        ((0.0, 1.0, 2.0), "no different from the start by more than noise: score +1 +- 0.58"),
        ((-1.0, -2.0, -3.0), "worse than the start: score -2 +- 0.58"),
    ],
)
def test_whether_it_helped(after, words):
    assert did_it_help(answers(0.0, 0.0, 0.0), answers(*after)).startswith(words)


def test_one_prompt_tells_nothing_of_others():
    told = did_it_help(answers(0.0, 0.0, prompts=(4, 4)), answers(1.0, 1.0, prompts=(4, 4)))
    assert told.startswith("no different from the start by more than noise: score +1 (its error is unknown)")
    assert told.endswith("(2 answers to 1 held-out prompts)")
