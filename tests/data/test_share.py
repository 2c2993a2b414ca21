"""Which comparisons a step takes of its prompts and of those held out."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from tiny import comparison_rows

from dschat.data import splits
from dschat.data.comparisons import Comparison, write_comparisons
from dschat.data.share import Task, rows_of_part, some_of

ONE, OTHER = Comparison("p", ("a", "b")), Comparison("p", ("c",))
COMPARISONS = [ONE, OTHER, ONE, Comparison("q"), Comparison("q", ("a",)), Comparison("r", ("a", "b"))]
"""Prompt p has two different answers, its first row twice; q has a row without an answer."""
PARTS = np.array([0, 0, 0, 0, 0, splits.EVALUATION])


@pytest.fixture
def index(tmp_path):
    return write_comparisons(((found, 0, False) for found in COMPARISONS), tmp_path / "comparisons.arrow")


def task(step, **settings):
    return Task(step, comparison_rows, "--max_seq_len", 8, {}, lacks="nothing to learn", **settings)


@pytest.mark.parametrize(
    ("step", "unique", "rows"),
    [
        (1, False, [0, 1, 4]),  # every different best answer
        (1, True, [0, 4]),  # every prompt once
        (2, False, [0]),  # rows with a pair, each once
        (3, False, [0, 1, 2, 3, 4]),  # a prompt as often as the data has it
        (3, True, [0, 3]),
    ],
)
def test_each_step_takes_of_its_part_what_it_learns_from_once(index, step, unique, rows):
    found, _ = rows_of_part(0, index, PARTS, task(step, unique_prompts=unique))
    assert found.tolist() == rows


def test_prompts_without_what_a_step_learns_from_are_counted(index):
    left_out = [rows_of_part(0, index, PARTS, task(step))[1] for step in (1, 2)]
    assert left_out == [Counter({"nothing to learn": 0}), Counter({"nothing to learn": 1})]  # q has no pair


def test_what_repeats_an_earlier_row_is_marked_and_named(index):
    marked = {step: np.flatnonzero(task(step).repeats(index, PARTS)).tolist() for step in (1, 2, 3)}
    assert marked == {1: [2], 2: [2], 3: []}
    assert task(2).what_repeats == "repeated row"
    assert task(3).what_repeats == "prompt repeated in evaluation"
    assert task(1, unique_prompts=True).what_repeats == "repeated prompt"


def test_a_larger_sample_adds_to_a_smaller_one(index):
    rows = np.arange(6)
    samples = [some_of(rows, index, count, seed=3).tolist() for count in range(8)]
    assert [len(sample) for sample in samples] == [0, 1, 2, 3, 4, 5, 6, 6]
    for small, large in pairwise(samples):
        assert set(small) <= set(large)
        assert large == sorted(large)
