"""What is in the columns of a row is checked, and named where it is wrong."""

import pytest
from layout_rows import PAIR, read

from dschat.data.cells import (
    BadRow,
    Columns,
    describe,
    finite_number,
    first_filled,
    has,
    is_blank,
    optional,
    replaced,
)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, '"chosen" must be a string, but is null'),
        ([], '"chosen" must be a list of messages, but is a list: \\[\\]'),
        ([{"role": "assistant"}], 'message 1 of "chosen" has no "content"'),
        ({"text": "x"}, 'message 1 of "chosen" has no "role"'),
        (3, '"chosen" must be a string, but is a number: 3'),
        (True, '"chosen" must be a string, but is true or false: True'),
        ("", '"chosen" is empty$'),
        (" \n", '"chosen" is empty but for white space'),
        ("half \ud83d", '"chosen" holds half of a surrogate pair at character 6'),
        ([{"role": "assistant", "content": "\udc00"}], 'message 1 of "chosen" holds half of a surrogate'),
    ],
)
def test_a_value_that_is_no_text_is_named(value, message):
    with pytest.raises(BadRow, match=message):
        read({**PAIR, "chosen": value})


def test_long_values_are_cut_short_in_messages():
    with pytest.raises(BadRow, match=r"is a list: .{60}\.\.\.$"):
        read({**PAIR, "margin": ["x" * 100]})


def test_a_row_notes_what_it_is_asked_for_and_a_changed_one_notes_it_too():
    row = Columns({"a": 1, "b": 2, "c": 3})
    assert ("b" in row, dict(row), has(row, "b"), first_filled(row, "x", "b")) == (True, dict(row), True, "b")
    assert row.asked == set()
    other = replaced(row, b=5)
    assert (other["b"], row.get("c"), row.get("d")) == (5, 3, None)
    assert row.asked == {"b", "c", "d"}


@pytest.mark.parametrize(
    ("value", "blank"),
    [(None, True), (float("nan"), True), (" \n", True), ([], True), ({}, True), (0, False), (False, False)],
)
def test_a_value_that_says_nothing_is_blank_and_counts_as_absent(value, blank):
    assert is_blank(value) == blank
    assert optional({"a": value}, "a") == (None if blank else value)


@pytest.mark.parametrize(("value", "number"), [(2, 2.0), (" -1.5e2 ", -150.0), (".5", 0.5), (3.4e38, 3.4e38)])
def test_numbers_and_text_of_numbers_are_numbers(value, number):
    assert finite_number(value, "n") == number


@pytest.mark.parametrize("value", ["", "1,5", "nan", "1e39", 10**39, float("inf"), True, None, [1]])
def test_what_float32_does_not_hold_is_no_number(value):
    with pytest.raises(BadRow, match="n must be a"):
        finite_number(value, "n")


def test_rows_with_one_fault_have_one_reason_whatever_their_values():
    assert (
        BadRow('message 12 of "x" must be a list, but is str: 5').reason == 'message N of "x" must be a list'
    )
    assert BadRow('the row has no "a"; its columns are: b').reason == 'the row has no "a"'


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "null"), (float("nan"), "NaN"), ({"a": 1}, "an object: {'a': 1}"), (True, "true or false: True")],
)
def test_values_are_described_by_their_kind(value, words):
    assert describe(value) == words
