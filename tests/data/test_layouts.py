import gzip
import json
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_rows import ASKED, PAIR, TURN, read, said, shared_gpt

from dschat.data.cells import BadRow, DroppedRow
from dschat.data.comparisons import Comparison, Turn
from dschat.data.layouts import LAYOUTS, recognise
from dschat.data.messages import ROLES

SHARED = Path(os.environ.get("DSCHAT_SHARED", Path(__file__).resolve().parents[2] / ".." / "shared")) / "data"


ASKED_MESSAGES = said("Hi", "Hello", "Sum?")


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("preference", {**PAIR, "prompt": " p ", "id": 7}, Comparison(" p ", ("good", "bad"))),
        (
            "preference",
            {"prompt": ASKED_MESSAGES, "chosen": "good\n", "rejected": "bad"},
            Comparison(ASKED, ("good\n", "bad")),
        ),
        (
            "preference",
            {
                "prompt": ASKED_MESSAGES,
                "chosen": said(" 2 ", roles=["assistant"]),
                "rejected": {"role": "assistant", "content": "3"},
                "margin": 2,
            },
            Comparison(ASKED, ("2", "3"), margin=2.0),
        ),
        (
            "preference",
            {"prompt": "Hi ", "chosen": said("Hi", "2"), "rejected": said("Hi", "3")},
            Comparison((Turn("user", "Hi"),), ("2", "3")),
        ),
        (
            "sharegpt_preference",
            {
                "conversations": shared_gpt("Hi", "Hello", "Sum?"),
                "chosen": {"from": "gpt", "value": "2"},
                "rejected": {"from": "gpt", "value": "3"},
            },
            Comparison(ASKED, ("2", "3")),
        ),
        (
            "sharegpt_preference",
            {
                "conversations": shared_gpt("Hi"),
                "chosen": shared_gpt("Hi", "2"),
                "rejected": "3",
                "system": "S",
            },
            Comparison((Turn("system", "S"), Turn("user", "Hi")), ("2", "3")),
        ),
        (
            "sharegpt_preference",
            {"conversations": shared_gpt("Hi"), "chosen": "2", "rejected": "3", "system": "S"},
            Comparison((Turn("system", "S"), Turn("user", "Hi")), ("2", "3")),
        ),
        (
            "sharegpt_preference",
            {"conversations": "Hi", "chosen": "2", "rejected": "3", "system": "S"},
            Comparison((Turn("system", "S"), Turn("user", "Hi")), ("2", "3")),
        ),
        (
            "sharegpt_preference",
            {"conversations": "Hi", "chosen": "2", "rejected": "3", "system": ""},
            Comparison("Hi", ("2", "3")),
        ),
        ("hh", {"chosen": TURN + " Two.", "rejected": TURN + " 3."}, Comparison(TURN, (" Two.", " 3."))),
        (
            "hh",
            {
                "chosen": [*ASKED_MESSAGES, *said("2", roles=["assistant"])],
                "rejected": said("Hi", "Hello", "Sum?", "3"),
            },
            Comparison(ASKED, ("2", "3")),
        ),
        ("ranked", {"prompt": "p", "answers": ["a", "b"]}, Comparison("p", ("a", "b"), (0.0, 1.0))),
        (
            "messages",
            {"messages": said("Hi", "Hello", "Sum?", "2")},
            Comparison(ASKED, ("2",), learn_all_turns=True),
        ),
        (
            "sharegpt",
            {"conversations": shared_gpt("Hi", "Hello"), "system": " S "},
            Comparison((Turn("system", "S"), Turn("user", "Hi")), ("Hello",), learn_all_turns=True),
        ),
        (
            "alpaca",
            {"instruction": "I ", "input": "x", "output": "o "},
            Comparison((Turn("user", "I\n\nx"),), ("o ",)),
        ),
        (
            "alpaca",
            {"instruction": "I", "input": "", "output": "o"},
            Comparison((Turn("user", "I"),), ("o",)),
        ),
        ("question_answer", {"question": "q", "answer": "a"}, Comparison((Turn("user", "q"),), ("a",))),
        ("prompt_completion", {"prompt": "p", "completion": "c"}, Comparison("p", ("c",))),
        (
            "prompt_completion",
            {"prompt": said("Hi"), "completion": said("Hello", roles=["assistant"])},
            Comparison((Turn("user", "Hi"),), ("Hello",)),
        ),
        ("prompt_response", {"prompt": TURN, "response": " c"}, Comparison(TURN, (" c",))),
        ("prompt_only", {"prompt": TURN}, Comparison(TURN)),
        ("prompt_only", {"prompt": ASKED_MESSAGES}, Comparison(ASKED)),
    ],
)
def test_each_layout_is_known_by_its_columns_and_read(name, row, expected):
    assert recognise(row).name == name
    assert read(row) == expected


@pytest.mark.parametrize("row", [{"chosen": TURN + " Two.", "rejected": TURN + " 3."}, {"prompt": TURN}])
def test_dialogues_with_windows_line_endings_are_dialogues(row):
    windows = {name: value.replace("\n", "\r\n") for name, value in row.items()}
    assert recognise(row).read(windows) == recognise(row).read(row)


def test_windows_line_endings_of_other_text_stay():
    row = {"prompt": "Human: a\r\n\r\nb"}
    assert recognise(row).read(row) == Comparison(row["prompt"])


@pytest.mark.parametrize(("word", "role"), ROLES.items())
def test_the_parties_are_known_by_their_usual_names(word, role):
    first, last = Turn(role, "x"), Turn("assistant", "y")
    row = {"messages": [*said("q"), {"role": word.upper(), "content": " x "}, *said("q", "y")]}
    comparison = read(row)
    assert comparison.answers == (last.content,)
    middle = Turn("user", "q\n\nx\n\nq") if role == "user" else first
    assert middle in comparison.prompt


def test_neighbours_of_one_role_merge():
    row = {"messages": said("a", "b", "c", "d", roles=["user", "user", "assistant", "assistant"])}
    assert read(row) == Comparison((Turn("user", "a\n\nb"),), ("c\n\nd",), learn_all_turns=True)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("text", '"messages" must be a list of messages, but is str'),
        (["text"], 'message 1 of "messages" must be an object'),
        (
            [*said("a"), {"role": "wizard", "content": "b"}],
            "message 2 of .* is by 'wizard'; known are system, developer, user",
        ),
        ([*said("a"), {"role": None, "content": "b"}], "is by None"),
        (said("a", ""), 'message 2 of "messages" is empty'),
        ([{"from": "human", "content": "a"}], 'message 1 of "messages" has no "value"'),
        (said("a", roles=["assistant"]), "has an answer but no question before it"),
        (said("s", "a", roles=["system", "assistant"]), "has an answer but no question before it"),
    ],
)
def test_messages_that_cannot_be_read_are_named(messages, message):
    with pytest.raises(BadRow, match=message):
        read({"messages": messages})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": said("a", "b", "c")}, "end with a question"),
        ({"conversations": [*shared_gpt("a"), {"from": "observation", "value": "5"}]}, "end with a question"),
        ({**PAIR, "prompt": said("a", "b")}, "prompts that end with an answer"),
        ({**PAIR, "prompt": TURN + " Two."}, "prompts that end inside an answer"),
        ({"prompt": "Assistant: Hm"}, "prompts that end inside an answer"),
        ({**PAIR, "prompt": "\n\nHuman: \n\nAssistant:"}, "prompts with an empty question"),
        ({"prompt": "Be brief.\n\nHuman:\n\nAssistant:"}, "prompts with an empty question"),
        ({"prompt": TURN + " Two.\n\nHuman: "}, "prompts with an empty question"),
        ({"prompt": "\n\nAssistant:"}, "prompts with an empty question"),
        (
            {"chosen": "\n\nHuman: \n\nAssistant: 1", "rejected": "\n\nHuman: \n\nAssistant: 2"},
            "prompts with an empty question",
        ),
        ({**PAIR, "chosen": said("p")}, "end with a question"),
        ({**PAIR, "chosen": said("p", "a"), "rejected": said("q", "b")}, "part before"),
        ({"chosen": TURN + " 2", "rejected": "\n\nHuman: Hi\n\nAssistant: Go away"}, "part before"),
        ({"chosen": TURN + " 2", "rejected": TURN.replace("Hello", "Hey") + " 3"}, "part before"),
        ({"chosen": TURN + " 2", "rejected": TURN + " 3\n\nHuman: Thanks"}, "end with a question"),
        ({"chosen": TURN + " ", "rejected": TURN + " 3"}, "empty answers"),
        ({"chosen": said("a", "b"), "rejected": said("c", "d")}, "part before"),
    ],
)
def test_sound_rows_of_no_use_are_dropped_with_their_reason(row, reason):
    with pytest.raises(DroppedRow, match=reason):
        read(row)


def test_a_system_message_of_the_conversation_goes_before_the_column():
    row = {"conversations": [{"from": "system", "value": "in"}, *shared_gpt("a", "b")], "system": "column"}
    assert read(row).prompt[0] == Turn("system", "in")
    for none in (None, "", " "):
        assert read({"conversations": shared_gpt("a", "b"), "system": none}).prompt == (Turn("user", "a"),)
    with pytest.raises(BadRow, match='"system" must be a string'):
        read({"conversations": shared_gpt("a", "b"), "system": 5})


KEYS = ["role", "content", "from", "value", "text", "tool_calls"]
WORDS = ["user", "assistant", "human", "gpt", "system", "tool", TURN, TURN + " x", "\ud83d"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)
COLUMN_NAMES = sorted({column for known in LAYOUTS.values() for column in known.columns})
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(list(ROLES)), "content": st.text(min_size=1, max_size=3)}),
    max_size=4,
)
ROWS = st.dictionaries(
    st.sampled_from([*COLUMN_NAMES, "margin", "ranks", "scores", "system", "input", "history", "label"]),
    VALUES | MESSAGES,
)


@pytest.mark.slow
@settings(max_examples=500)
@given(ROWS, st.sampled_from(list(LAYOUTS)))
def test_whatever_a_row_holds_it_is_read_or_refused(row, name):
    for choose in (recognise, lambda _: LAYOUTS[name]):
        try:
            comparison = choose(row).read(row)
        except (BadRow, DroppedRow):
            continue
        prompt = comparison.prompt
        for said_text in (
            *comparison.answers,
            *([prompt] if isinstance(prompt, str) else [t.content for t in prompt if t.role != "tool"]),
        ):
            assert said_text.strip()
            said_text.encode()
        if not isinstance(prompt, str):
            assert all(a.role != b.role or a.role == "tool" for a, b in pairwise(prompt))


def hh_rows():
    with gzip.open(SHARED / "hh_rlhf_harmless" / "test.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def gsm8k_rows():
    files = [SHARED / "gsm8k" / name for name in ("train.jsonl", "test.jsonl")]
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def dpo_rows():
    return json.loads((SHARED / "dpo_demo" / "dpo_en_demo.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared real data")
@pytest.mark.parametrize(
    ("rows", "name", "counts"),
    [
        # 2,307 of 2,312 share their prompt, as the data's own page says; four of those have an empty answer.
        (hh_rows, "hh", {"pairs": 2303, "part before their last answer": 5, "empty answers": 4}),
        (gsm8k_rows, "question_answer", {"pairs": 0, "answered": 7473 + 1319}),
        (dpo_rows, "sharegpt_preference", {"pairs": 300}),
    ],
)
def test_real_data_are_read_to_the_last_row(rows, name, counts):
    found = Counter()
    for row in rows():
        assert recognise(row).name == name
        try:
            comparison = read(row)
        except DroppedRow as reason:
            found[str(reason).removeprefix("dialogues that ")] += 1
        else:
            found["pairs"] += len(comparison.pairs)
            found["answered"] += len(comparison.answers) == 1
    assert {reason: number for reason, number in found.items() if number} == {
        reason: number for reason, number in counts.items() if number
    }


def test_a_row_that_holds_the_rows_says_so():
    with pytest.raises(BadRow, match='if the rows are the objects in "data", save that list alone'):
        recognise({"version": "1.0", "data": [{"prompt": "p"}]})


def test_messages_may_repeat_a_prompt_that_is_a_dialogue_in_text():
    comparison = read({"prompt": TURN, "chosen": said("Hi", "Hello", "Sum?", "Two."), "rejected": " No."})
    assert [turn.content for turn in comparison.prompt] == ["Hi", "Hello", "Sum?"]
    assert comparison.answers == ("Two.", " No.")
    with pytest.raises(BadRow, match="they are not the prompt"):
        read({"prompt": TURN, "chosen": said("Hi", "Hey", "Sum?", "Two."), "rejected": " No."})
