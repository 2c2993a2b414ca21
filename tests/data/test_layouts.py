import gzip
import json
import os
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dschat.data.cells import BadRow, DroppedRow
from dschat.data.comparisons import Comparison, Turn
from dschat.data.layouts import LAYOUTS, layout, recognise
from dschat.data.messages import ROLES

SHARED = Path(os.environ.get("DSCHAT_SHARED", Path(__file__).resolve().parents[2] / ".." / "shared")) / "data"
TURN = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Sum?\n\nAssistant:"
ASKED = (Turn("user", "Hi"), Turn("assistant", "Hello"), Turn("user", "Sum?"))
PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}


def said(*contents, roles=("user", "assistant")):
    """Messages by the roles in turn."""
    return [{"role": roles[i % len(roles)], "content": content} for i, content in enumerate(contents)]


def shared_gpt(*contents):
    return [{"from": ("human", "gpt")[i % 2], "value": content} for i, content in enumerate(contents)]


ASKED_MESSAGES = said("Hi", "Hello", "Sum?")


def read(row):
    return recognise(row).read(row)


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


def test_every_layout_is_documented_and_none_hides_a_later_one():
    names = list(LAYOUTS)
    for i, later in enumerate(names):
        assert LAYOUTS[later].read.__doc__
        earlier = [name for name in names[:i] if set(LAYOUTS[name].columns) <= set(LAYOUTS[later].columns)]
        assert not earlier, f"{earlier} take the rows of {later}"


def test_the_documentation_has_an_example_of_every_layout():
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
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


@pytest.mark.parametrize("row", [{"chosen": TURN + " Two.", "rejected": TURN + " 3."}, {"prompt": TURN}])
def test_dialogues_with_windows_line_endings_are_dialogues(row):
    windows = {name: value.replace("\n", "\r\n") for name, value in row.items()}
    assert recognise(row).read(windows) == recognise(row).read(row)


def test_windows_line_endings_of_other_text_stay():
    row = {"prompt": "Human: a\r\n\r\nb"}
    assert recognise(row).read(row) == Comparison(row["prompt"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, 'the row has no "rejected"; its columns are: prompt, chosen'),
        ({"prompt": "p", "rejected": "a"}, 'the row has no "chosen"; '),
        ({"prompt": "p", "completion": "c", "chosen": "a"}, 'has no "rejected"'),
        ({"conversations": [], "chosen": "a"}, 'has no "rejected"'),
        (
            {"question": "q"},
            'has no "answer"; its columns are: question; the known layouts are: prompt, chosen',
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
    row |= {"prompt": "p", "question": "q"}
    del row[column]
    with pytest.raises(BadRow, match=f'the row has no "{column}"'):
        LAYOUTS[name].read(row)


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


def test_a_system_message_of_the_conversation_goes_before_the_column():
    row = {"conversations": [{"from": "system", "value": "in"}, *shared_gpt("a", "b")], "system": "column"}
    assert read(row).prompt[0] == Turn("system", "in")
    for none in (None, "", " "):
        assert read({"conversations": shared_gpt("a", "b"), "system": none}).prompt == (Turn("user", "a"),)
    with pytest.raises(BadRow, match='"system" must be a string'):
        read({"conversations": shared_gpt("a", "b"), "system": 5})


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
