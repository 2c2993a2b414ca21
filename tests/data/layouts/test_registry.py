"""Layouts are registered by one function each and known by their columns."""

import json
import re
from pathlib import Path

import pytest
from layout_rows import TURN, read, said, shared_gpt

from dschat.data.cells import BadRow
from dschat.data.comparisons import Comparison
from dschat.data.layouts import LAYOUTS, layout, recognise


def test_every_layout_is_documented_and_none_hides_a_later_one():
    names = list(LAYOUTS)
    for i, later in enumerate(names):
        assert LAYOUTS[later].read.__doc__
        earlier = [name for name in names[:i] if set(LAYOUTS[name].columns) <= set(LAYOUTS[later].columns)]
        assert not earlier, f"{earlier} take the rows of {later}"


def test_the_documentation_has_an_example_of_every_layout():
    page = (Path(__file__).resolve().parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    examples = re.findall(r"^\| `(\w+)` \| `(\{.*\})` \|$", page, re.MULTILINE)
    assert [name for name, _ in examples] == list(LAYOUTS)
    for name, row in examples:
        assert recognise(json.loads(row)).name == name
        assert read(json.loads(row)).prompt


def test_a_new_layout_is_one_function(monkeypatch):
    monkeypatch.setattr("dschat.data.layouts.registry.LAYOUTS", dict(LAYOUTS))

    @layout("qa_pair", "q", "a")
    def qa_pair(row):
        return Comparison(row["q"], (row["a"],))

    assert read({"q": "Why?", "a": "So."}) == Comparison("Why?", ("So.",))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, 'the row has no "rejected"; its columns are: prompt, chosen'),
        ({"prompt": "p", "rejected": "a"}, 'the row has no "chosen"; '),
        ({"prompt": "p", "completion": "c", "chosen": "a"}, 'has no "rejected"'),
        ({"conversations": [], "chosen": "a"}, 'has no "rejected"'),
        (
            {"question": "q"},
            'has no "answer"; its columns are: question; --prompt_key, .*; the known layouts are: ',
        ),
        ({"text": "t"}, "--prompt_key, --chosen_key, --rejected_key and --messages_key name columns"),
        ({}, "its columns are: none"),
    ],
)
def test_unknown_columns_are_named_with_what_is_missing(row, message):
    with pytest.raises(BadRow, match=message):
        recognise(row)


@pytest.mark.parametrize(
    ("name", "column"), [(k.name, column) for k in LAYOUTS.values() for column in k.columns if not k.fits]
)
def test_a_later_row_that_lacks_a_column_says_which(name, column):
    row = dict.fromkeys(LAYOUTS[name].columns, TURN + " x")
    row |= {"messages": said("Hi", "a"), "conversations": shared_gpt("Hi"), "answers": ["a"]}
    if "conversations" in LAYOUTS[name].columns and len(LAYOUTS[name].columns) == 1:
        row["conversations"] = shared_gpt("Hi", "a")
    row |= {"prompt": "p", "question": "q", "chosen_input_ids": [5], "rejected_input_ids": [5]}
    del row[column]
    with pytest.raises(BadRow, match=f'the row has no "{column}"'):
        LAYOUTS[name].read(row)
