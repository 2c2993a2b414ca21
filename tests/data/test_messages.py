import json
import math

import pytest

from dschat.data.cells import BadRow
from dschat.data.comparisons import Turn
from dschat.data.messages import MARKS, THOUGHTS, turns

QUESTION = {"role": "user", "content": "q"}


def answered(**fields):
    """The turn of an assistant's message with these fields, after a question."""
    return turns([QUESTION, {"role": "assistant", "content": "a", **fields}], "m")[1]


def fields_of(turn):
    return json.loads(turn.fields) if turn.fields else {}


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize(
    ("value", "learn"),
    [
        (0, False),
        (0.0, False),
        (False, False),
        ("false", False),
        ("0", False),
        ("0.0", False),
        ("False ", False),
        ("no", False),
        (1, True),
        (1.0, True),
        (True, True),
        ("true", True),
        ("1", True),
        (None, None),
        ("", None),
        (math.nan, None),
    ],
)
def test_a_mark_says_whether_a_message_is_learned(mark, value, learn):
    assert answered(**{mark: value}) == Turn("assistant", "a", learn)


@pytest.mark.parametrize("value", [0.5, 2, -1, "half", "0.5", [0, 1], math.inf])
def test_a_mark_that_is_neither_yes_nor_no_is_refused(value):
    with pytest.raises(
        BadRow, match=r'"weight" of message 2 of m is .*; a message is learned or not: give 1'
    ):
        answered(weight=value)


def test_marks_that_contradict_one_another_are_refused():
    assert answered(weight=0, train=False).learn is False
    with pytest.raises(BadRow, match=r"message 2 of m is marked both .*: weight, train"):
        answered(weight=0, train=True)


def test_no_on_a_message_that_is_not_learned_anyway_says_nothing_but_yes_does():
    for role in ("user", "system", "tool"):
        some = [{**QUESTION, "role": role, "train": train} for train in (False, True, None)]
        assert [turns([one], "m")[0].learn for one in some] == [None, True, None]


def test_neighbours_with_different_marks_stay_apart():
    some = [
        QUESTION,
        *({"role": "assistant", "content": c, "weight": w} for c, w in (("a", 0), ("b", 0), ("c", 1))),
    ]
    assert turns(some, "m")[1:] == (Turn("assistant", "a\n\nb", False), Turn("assistant", "c", True))
    asked = [{**QUESTION, "weight": 0}, QUESTION, {"role": "assistant", "content": "a"}]
    assert turns(asked, "m") == (Turn("user", "q\n\nq"), Turn("assistant", "a"))


@pytest.mark.parametrize("name", THOUGHTS)
def test_a_thought_is_one_field_whatever_it_is_called(name):
    assert fields_of(answered(**{name: " hm "})) == {"reasoning": "hm"}
    assert answered(**{name: None}) == answered(**{name: " "}) == answered(**{name: math.nan}) == answered()
    assert turns([QUESTION, {"role": "assistant", "content": "", name: "hm"}], "m")[1].content == ""


def test_two_names_of_one_thought_are_one_and_two_thoughts_are_refused():
    assert fields_of(answered(reasoning="hm", reasoning_content="hm")) == {"reasoning": "hm"}
    with pytest.raises(BadRow, match="message 2 of m has several thoughts"):
        answered(reasoning="hm", thinking="oh")


def test_every_further_field_goes_with_the_turn_but_what_says_where_it_comes_from():
    assert fields_of(answered(name="Bo", mood="calm", id=7, source="x")) == {"mood": "calm", "name": "Bo"}
    assert answered(name="", tool_calls=[], function_call=None, mood={}, prefix=False) == Turn(
        "assistant", "a"
    )


def test_neighbours_merge_over_fields_that_nobody_knows_and_not_over_those_that_matter():
    def two(**fields):
        return turns([{**QUESTION, **fields}, QUESTION], "m")

    assert [turn.content for turn in two(mood="calm")] == ["q\n\nq"]
    assert [turn.content for turn in two(name="Bo")] == ["q", "q"]
    tools = [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    assert len(turns(tools, "m")) == 2


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    "message",
    [
        {"tool_calls": [CALL]},
        {"content": None, "tool_calls": [CALL]},
        {"content": "", "tool_calls": json.dumps([CALL])},
        {"tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}', "description": None}}]},
        {"tool_calls": [{"name": "add", "arguments": {"a": 1}}]},
        {"function_call": {"name": "add", "arguments": '{"a": 1}'}},
        {"role": None, "from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"role": "tool_call", "content": '[{"name": "add", "arguments": {"a": 1}}]'},
    ],
)
def test_a_call_has_one_form_however_it_is_written(message):
    turn = turns([QUESTION, {"role": "assistant", **message}], "m")[1]
    assert (turn.role, turn.content, fields_of(turn)) == ("assistant", "", {"tool_calls": [CALL]})


def test_what_a_tool_returned_is_text_or_becomes_json_and_may_be_nothing():
    for role in ("tool", "function", "observation", "ipython", "tool_response"):
        assert turns([{"from": role, "value": " 5 "}], "m") == (Turn("tool", "5"),)
    for value, text in (({"sum": 5}, '{"sum": 5}'), ([1, 2], "[1, 2]"), (5, "5"), ("", ""), (None, "")):
        assert turns([{"role": "tool", "content": value}], "m") == (Turn("tool", text),)
    assert turns([{"role": "tool", "content": [{"type": "text", "text": "5"}]}], "m") == (Turn("tool", "5"),)


@pytest.mark.parametrize("calls", ["add", [{"arguments": {}}], 5, [None]])
def test_calls_that_call_nothing_are_refused(calls):
    with pytest.raises(
        BadRow, match=r'"tool_calls" of message 2 of m must be a list of objects with a "name"'
    ):
        answered(tool_calls=calls)


def test_parts_of_text_are_joined_and_thoughts_among_them_found():
    parts = [
        {"type": "text", "text": "a"},
        "b",
        {"text": "c", "type": None},
        {"type": "output_text", "text": ""},
    ]
    assert answered(content=parts).content == "a\nb\nc"
    assert answered(content={"type": "text", "text": "a"}) == answered()
    thought = {"type": "thinking", "thinking": "hm"}
    assert fields_of(answered(content=[thought, {"type": "text", "text": "a"}])) == {"reasoning": "hm"}


@pytest.mark.parametrize("kind", ["image_url", "image", "input_audio", "video", "tool_use", "file"])
def test_other_parts_are_refused_by_name(kind):
    parts = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "x"}}]
    with pytest.raises(BadRow, match=f"part 2 of message 1 of m is of type '{kind}'; only text can be read"):
        turns([{"role": "user", "content": parts}], "m")


def test_a_developer_is_the_system():
    assert turns([{"role": "developer", "content": "s"}, QUESTION], "m")[0] == Turn("system", "s")


@pytest.mark.parametrize("nothing", ["", " \n", None, math.nan, []])
def test_a_system_message_that_says_nothing_is_none(nothing):
    for role in ("system", "developer"):
        assert turns([{"role": role, "content": nothing}, QUESTION], "m") == (Turn("user", "q"),)
    with pytest.raises(BadRow, match="m has no message that says anything"):
        turns([{"role": "system", "content": nothing}], "m")


@pytest.mark.parametrize(
    ("nothing", "message"),
    [
        ("", "is empty"),
        (" ", "is empty but for white space"),
        (None, "must be a string, but is null"),
        ([], "is empty"),
        ([{"type": "text", "text": ""}], "is empty"),
    ],
)
def test_a_question_or_an_answer_that_says_nothing_is_refused(nothing, message):
    for role in ("user", "assistant"):
        with pytest.raises(BadRow, match=f"message 1 of m {message}"):
            turns([{"role": role, "content": nothing}], "m")
