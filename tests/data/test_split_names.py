"""Names of files and folders say which split they belong to."""

import re

import pytest

from dschat.data.entries import Entry
from dschat.data.split_names import choose_splits, is_for_evaluation, is_plain, says_a_split, split_of
from dschat.errors import UserError


@pytest.mark.parametrize(
    ("stem", "split"),
    [
        ("train", "train"),
        ("Train-00000-of-00002", "train"),
        ("train_sft-00000-of-00003-6ef3991c06080e14", "train_sft"),
        ("train-sft", "train_sft"),
        ("0000", "numbered"),
        ("part-00000", "part"),
        ("part-00000-8f0e1a2b-1c2d-4e5f-8a9b-0123456789ab-c000.snappy", "part_c_snappy"),
        ("data_0", "data"),
        ("train_10", "train"),
        ("v1_train", "v_train"),
    ],
)
def test_names_that_differ_in_a_number_are_one_split(stem, split):
    assert split_of(stem) == split


@pytest.mark.parametrize(
    ("name", "expected"),
    [("test", True), ("test_sft", True), ("validation-clean", True), ("gsm_eval", True), ("dev.v2", True)]
    + [("train", False), ("latest", False), ("train_eval", False), ("devil", False), ("default", False)],
)
def test_splits_for_evaluation_are_told_by_a_word_of_their_name(name, expected):
    assert is_for_evaluation(name) == expected


@pytest.mark.parametrize(
    ("names", "entry", "chosen"),
    [
        (["train", "test"], Entry("x"), (["train"], ["test"])),
        (["train_a", "test_a", "train_b", "test_b"], Entry("x", split="train_a"), (["train_a"], ["test_a"])),
        (["a", "b"], Entry("x", split="a+b+a"), (["a", "b"], [])),
        (["data", "dev_x"], Entry("x"), (["data"], ["dev_x"])),
        (["train", "other", "test_x"], Entry("x"), (["train"], [])),
        (["train", "test", "validation"], Entry("x", evaluates=True), (["test", "validation"], [])),
        (["train"], Entry("x", evaluates=True), (["train"], [])),
    ],
)  # fmt: skip
def test_the_splits_to_train_and_to_evaluate_on_are_told_by_name(names, entry, chosen):
    assert choose_splits(names, entry) == chosen


@pytest.mark.parametrize(
    ("names", "entry", "message"),
    [
        (["a", "b"], Entry("x"), "several splits to train on: a, b. Write"),
        (["test"], Entry("x"), "no split to train on (found: test)"),
        ([], Entry("x"), "there are no splits in it"),
        (["train"], Entry("x", split="tiny"), "there is no split tiny (found: train)"),
        (["test_a", "test_b"], Entry("x", evaluates=True), "several splits to evaluate on: test_a, test_b"),
    ],
)
def test_a_choice_that_is_left_is_named_with_what_to_write(names, entry, message):
    with pytest.raises(UserError, match=re.escape(message)):
        choose_splits(names, entry)


def test_a_name_may_be_a_split_or_only_say_one():
    assert [is_plain(name) for name in ("Train", "dev", "train_sft")] == [True, True, False]
    assert [says_a_split(name) for name in ("train_sft", "data", "my-test")] == [True, False, True]
