import json

import pytest

from dschat.data.cells import BadRow
from dschat.data.comparisons import Comparison, Turn
from dschat.data.tools import tools_of, with_tools

ADD = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": ADD}


@pytest.mark.parametrize(
    "row",
    [
        {"tools": [TOOL]},
        {"tools": [ADD]},
        {"tools": json.dumps([TOOL])},
        {"tools": json.dumps(ADD)},
        {"tools": [json.dumps(ADD)]},
        {"functions": [ADD]},
        {"tools": [], "functions": [ADD]},
        # As Parquet has it where another row's function has a parameter more.
        {"tools": [{"type": "function", "function": {**ADD, "strict": None}}]},
    ],
)
def test_tools_have_one_form_however_they_are_written(row):
    assert tools_of(row) == [TOOL]


@pytest.mark.parametrize("nothing", [None, [], "", "[]", "null", " ", float("nan"), {}])
def test_no_tools_are_none(nothing):
    comparison = Comparison("What?", ("5",))
    assert with_tools(comparison, {"tools": nothing}) is comparison


@pytest.mark.parametrize("tools", ["search", ["search"], [5], 7, [{"description": "Adds."}]])
def test_tools_that_are_no_schemas_are_refused(tools):
    with pytest.raises(BadRow, match='"tools" must be a list of objects with a "name", but holds'):
        tools_of({"tools": tools})


def test_tools_come_before_the_conversation_as_text_or_as_messages():
    expected = (Turn("tools", json.dumps([TOOL])), Turn("system", "S"), Turn("user", "What?"))
    for prompt in ("S\n\nHuman: What?\n\nAssistant:", expected[1:]):
        assert with_tools(Comparison(prompt), {"tools": [TOOL]}).prompt == expected
