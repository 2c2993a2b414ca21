"""Pairs that the data label both ways."""

import numpy as np
from tiny import comparison_rows

from dschat.data.comparisons import Comparison
from dschat.data.contradictions import count_contradictions


def count(*comparisons, keys):
    return count_contradictions(comparison_rows(*comparisons), np.array(keys))


AB, BA = Comparison("p", ("a", "b")), Comparison("p", ("b", "a"))


def test_a_pair_both_ways_is_one_contradiction_however_often_it_is_repeated():
    assert count(AB, BA, keys=[1, 1]) == 1
    assert count(AB, BA, AB, BA, BA, keys=[1] * 5) == 1


def test_one_order_or_two_prompts_are_none():
    assert count(AB, AB, keys=[1, 1]) == 0
    assert count(AB, BA, keys=[1, 2]) == 0


def test_white_space_around_an_answer_makes_no_other_answer():
    assert count(AB, Comparison("p", (" b\n", "a ")), keys=[1, 1]) == 1


def test_all_pairs_of_ranked_answers_are_looked_at_and_ties_are_no_pairs():
    ranked = Comparison("p", ("a", "b", "c"), (0.0, 1.0, 2.0))
    assert count(ranked, Comparison("p", ("c", "b", "a"), (0.0, 1.0, 2.0)), keys=[1, 1]) == 3
    assert count(ranked, Comparison("p", ("c", "b", "a"), (0.0, 0.0, 1.0)), keys=[1, 1]) == 2  # b and c tie
