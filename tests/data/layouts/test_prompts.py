"""Prompts as text or messages, after the system message and the history of their columns."""

import json

import pytest
from written_rows import reading

from dschat.errors import UserError

ASKED = [{"role": "user", "content": "q"}]


ANSWERED = [*ASKED, {"role": "assistant", "content": "it's"}]


@pytest.mark.parametrize("as_text", [json.dumps, repr])  # repr is what pandas writes into a table
@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"messages": ANSWERED}, 1),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "it's"}]}, 1),
        ({"prompt": ASKED, "completion": ANSWERED[1:]}, 1),
        ({"prompt": "q", "chosen": ANSWERED, "rejected": [*ASKED, {"role": "assistant", "content": "b"}]}, 2),
        ({"chosen": ANSWERED, "rejected": [*ASKED, {"role": "assistant", "content": "b"}]}, 2),
        ({"prompt": "q", "answers": ["b", "it's"], "scores": [1, 2]}, 2),
        ({"question": "q", "answer_a": ANSWERED[1:], "answer_b": "b", "winner": "a"}, 2),
    ],
)
def test_lists_may_be_text_as_in_tables(tmp_path, row, answers, as_text):
    row = {name: as_text(value) if isinstance(value, list) else value for name, value in row.items()}
    ((found,), _) = reading(tmp_path, row)
    assert found.prompt == "q" or [turn.content for turn in found.prompt] == ["q"]
    assert found.answers == ("it's", "b")[:answers]


def test_text_in_brackets_that_is_no_conversation_stays_text(tmp_path):
    for answer in ("[1, 2]", '["a"]', "[a]", "[]", '[{"a": 1}]', r"['\d']", "[" * 100_000):
        ((found,), _) = reading(tmp_path, {"prompt": "p", "completion": answer})
        assert found.answers == (answer,)


HISTORY = [["a", "b"], ["c", "d"]]


@pytest.mark.parametrize("history", [HISTORY, json.dumps(HISTORY)])
@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "input": "", "output": "o"},
        {"instruction": "q", "input": " ", "output": "o"},
        {"instruction": "q", "input": float("nan"), "output": "o"},
        {"instruction": "q", "output": "o"},
        {"instruction": "q", "chosen": "o", "rejected": "r"},
        {"instruction": "q", "output": ["o", "r"]},
        {"prompt": "q", "completion": "o"},
        {"question": "q", "answer": "o"},
        {"prompt": "q"},
    ],
)
def test_system_and_history_stand_before_the_question(tmp_path, row, history):
    ((found,), findings) = reading(tmp_path, {**row, "system": "s", "history": history})
    assert [turn.content for turn in found.prompt] == ["s", "a", "b", "c", "d", "q"]
    assert found.answers == {0: (), 1: ("o",), 2: ("o", "r")}[len(found.answers)]
    assert not findings.unread
    for nothing in (None, [], "", "[]", " ", float("nan")):
        ((alone,), _) = reading(tmp_path, {**row, "system": None, "history": nothing})
        assert alone.prompt == "q" or [turn.content for turn in alone.prompt] == ["q"]


@pytest.mark.parametrize("history", ["x", 3, [["a"]], ["ab"], [["a", ""]], [["a", None]], {"a": "b"}])
def test_a_history_that_is_none_is_named(tmp_path, history):
    with pytest.raises(UserError, match=r'rows\.jsonl:1: .*"history"'):
        reading(tmp_path, {"instruction": "q", "output": "o", "history": history})
