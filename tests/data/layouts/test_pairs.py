"""Pairs and ranked answers, whose order their columns tell."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_rows import ASKED, PAIR, TURN, read, said, shared_gpt

from dschat.data.cells import BadRow
from dschat.data.comparisons import Comparison, Turn


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("Just text", 'holds no .*Assistant.* and the row no "prompt"'),
        ("\n\nAssistant: Hi", '"chosen" has an answer but no question before it'),
    ],
)
def test_text_that_is_no_dialogue_is_an_error(chosen, message):
    with pytest.raises(BadRow, match=message):
        read({"chosen": chosen, "rejected": TURN + " x"})


def test_equal_answers_keep_the_whole_prompt():
    assert read({"chosen": TURN + " x", "rejected": TURN + " x"}) == Comparison(TURN, (" x", " x"))


def test_messages_before_an_answer_may_say_more_than_the_prompt_but_not_something_else():
    before = [{"role": "system", "content": "S"}, *said("Hi", "Hello", "Sum?")]
    row = {"prompt": "Sum?", "completion": [*before, {"role": "assistant", "content": "2"}]}
    assert read(row).prompt == (Turn("system", "S"), *ASKED)
    with pytest.raises(
        BadRow, match='"completion" has messages before its answer, and they are not the prompt'
    ):
        read({**row, "prompt": "Difference?"})


@pytest.mark.parametrize(
    ("margin", "expected"),
    [(None, 0.0), (0, 0.0), (1, 1.0), (0.5, 0.5), ("", 0.0), (float("nan"), 0.0), ("1.5", 1.5)],
)
@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"chosen": TURN + " x", "rejected": TURN + " y"},
        {"conversations": shared_gpt("a"), "chosen": "x", "rejected": "y"},
    ],
)
def test_the_margin_is_a_column_of_pairs(row, margin, expected):
    assert read({**row, "margin": margin}).margin == expected
    assert read(row).margin == 0.0


@pytest.mark.parametrize(
    ("margin", "message"),
    [
        (float("inf"), "must be a finite number"),
        (1e300, "must be a finite number"),
        (-1e39, "must be a finite number"),
        ("1e300", "must be a finite number"),
        (10**400, "must be a finite number"),
        (-0.5, "must be at least 0, but is -0.5"),
        ("wide", "must be a number, but is str"),
        (True, "must be a number, but is true or false"),
    ],
)
def test_a_margin_that_is_none_is_named(margin, message):
    with pytest.raises(BadRow, match=f'"margin" {message}'):
        read({**PAIR, "margin": margin})


@pytest.mark.parametrize(
    ("columns", "answers", "ranks", "pairs"),
    [
        ({}, "abc", (0, 1, 2), ["ab", "ac", "bc"]),
        ({"ranks": [2, 1, 3]}, "bac", (1, 2, 3), ["ba", "bc", "ac"]),
        ({"scores": [0, 7.5, -1]}, "bac", (-7.5, 0, 1), ["ba", "bc", "ac"]),
        ({"ranks": [2, 1, 2]}, "bac", (1, 2, 2), ["ba", "bc"]),  # a and c tie
        ({"scores": [1, 1, 1]}, "abc", (-1, -1, -1), []),
        ({"ranks": None, "scores": [1, 2, 3]}, "cba", (-3, -2, -1), ["cb", "ca", "ba"]),
        ({"ranks": [1, 2, 3], "scores": [1, 2, 3]}, "abc", (1, 2, 3), ["ab", "ac", "bc"]),  # ranks win
    ],
)
def test_ranked_answers_are_sorted_and_paired(columns, answers, ranks, pairs):
    comparison = read({"prompt": "p", "answers": ["a", "b", "c"], **columns})
    assert comparison == Comparison("p", tuple(answers), ranks)
    assert comparison.pairs == [tuple(pair) for pair in pairs]


def test_a_score_of_zero_is_the_rank_zero_without_a_sign():
    row = {"prompt": "p", "answers": ["a"], "scores": [0]}
    assert json.dumps(read(row).ranks) == "[0.0]"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"answers": []}, '"answers" must be a list of texts'),
        ({"answers": "ab"}, '"answers" must be a list of texts, but is str'),
        ({"answers": ["a", ""]}, "answer 2 is empty"),
        ({"answers": ["a", None]}, "answer 2 must be a string, but is null"),
        ({"ranks": [1]}, '"ranks" must be a list of 2 numbers, one an answer'),
        ({"scores": 1}, '"scores" must be a list of 2 numbers'),
        ({"scores": [1, float("nan")]}, '2 of "scores" must be a finite number'),
        ({"scores": [10**400, 1]}, '1 of "scores" must be a finite number'),
        ({"ranks": [True, 1]}, '1 of "ranks" must be a number'),
        ({"ranks": ["first", 1]}, '1 of "ranks" must be a number'),
    ],
)
def test_ranked_answers_that_cannot_be_read_are_named(columns, message):
    with pytest.raises(BadRow, match=message):
        read({"prompt": "p", "answers": ["a", "b"], **columns})


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=6))
def test_scores_and_the_ranks_they_stand_for_make_the_same_pairs(scores):
    answers = [f"answer {i}" for i in range(len(scores))]
    row = {"prompt": "p", "answers": answers, "scores": scores}
    pairs = {
        (a, b)
        for a, i in zip(answers, scores, strict=True)
        for b, j in zip(answers, scores, strict=True)
        if i > j
    }
    comparison = read(row)
    assert set(comparison.pairs) == pairs
    assert len(comparison.pairs) == len(pairs)
