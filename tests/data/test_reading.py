"""What a row holds is read, known to be harmless, or named."""

import json

import pytest

from dschat.data.findings import HARMLESS, Findings
from dschat.data.reading import Format, read_comparisons
from dschat.data.sources import open_source
from dschat.errors import UserError

PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}
EXAMPLE = {"prompt": "p", "completion": "c"}


def reading(tmp_path, *rows, form=None):
    """The comparisons of a file of these rows, and what is found on the way."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, findings = open_source(str(path)), Findings()
    found = list(read_comparisons(source, source.training, form or Format(), findings))
    return found, findings


def told(tmp_path, *rows, form=None):
    return "\n".join(reading(tmp_path, *rows, form=form)[1].lines())


def test_columns_that_nothing_reads_are_named_with_their_rows(tmp_path):
    text = told(tmp_path, {**PAIR, "thought": "hm", "id": 1}, {**PAIR, "thought": " ", "tags": ["x"]}, PAIR)
    assert text == "2 columns are not read: `thought` (1 rows), `tags` (1 rows)"


@pytest.mark.parametrize("column", HARMLESS[:3] + ["Source", "URL"])
def test_harmless_columns_are_not_named(tmp_path, column):
    assert told(tmp_path, {**PAIR, column: "x"}) == ""


@pytest.mark.parametrize("nothing", [None, "", " ", [], {}, float("nan")])
def test_a_column_that_holds_nothing_is_not_named(tmp_path, nothing):
    assert told(tmp_path, {**PAIR, "thought": nothing}) == ""


@pytest.mark.parametrize(
    "row",
    [
        {**PAIR, "margin": 1, "system": "s", "score_chosen": 2, "score_rejected": 1},
        {
            "instruction": "i",
            "input": "x",
            "output": "o",
            "system": "s",
            "history": [["a", "b"]],
            "label": True,
        },
        {"prompt": "p", "answers": ["a", "b"], "scores": [2, 1]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "kto_tag": 1},
        {"instruction": "i", "context": "x", "response": "o", "system_prompt": "s"},
    ],
)
def test_optional_columns_of_a_layout_are_read(tmp_path, row):
    assert told(tmp_path, row) == ""


def test_a_column_under_another_name_is_read(tmp_path):
    form = Format(keys=(("prompt", "query"),))
    assert told(tmp_path, {"query": "p", "chosen": "a", "rejected": "b"}, form=form) == ""


def test_columns_of_rows_that_are_kept_for_reward_functions_are_used(tmp_path):
    assert told(tmp_path, {**EXAMPLE, "thought": "hm"}, form=Format(keep_rows=True)) == ""


def test_long_lists_of_columns_are_cut(tmp_path):
    text = told(tmp_path, {**PAIR, **{f"column_{number}": "x" for number in range(20)}})
    assert text.startswith("20 columns are not read: `column_0` (1 rows)")
    assert text.endswith(" and 8 more")


@pytest.mark.parametrize("column", ["winner", "preference", "better", "choice", "chosen_index"])
@pytest.mark.parametrize("value", ["b", 1, "bad", True])
@pytest.mark.parametrize(
    "pair",
    [PAIR, {"prompt": "p", "answers": ["x", "y"]}, {"instruction": "i", "output": ["x", "y"]}],
)
def test_a_verdict_beside_an_ordered_pair_is_refused(tmp_path, pair, column, value):
    with pytest.raises(UserError, match=rf'rows.jsonl:1: "{column}" seems to say which answer is better'):
        reading(tmp_path, {**pair, column: value})


def test_a_verdict_beside_columns_that_flags_name_is_refused(tmp_path):
    row = {"prompt": "p", "answer_a": "x", "answer_b": "y", "winner": "b"}
    form = Format(keys=(("chosen", "answer_a"), ("rejected", "answer_b")))
    with pytest.raises(UserError, match='"winner" seems to say which answer is better'):
        reading(tmp_path, row, form=form)


def test_a_verdict_for_the_chosen_answer_or_under_a_named_format_is_no_error(tmp_path):
    for row in ({**PAIR, "winner": "chosen"}, {**PAIR, "winner": "good"}):
        assert len(reading(tmp_path, row)[0]) == 1
    assert "`winner`" in told(tmp_path, {**PAIR, "winner": "b"}, form=Format("preference"))


@pytest.mark.parametrize("column", ["label", "score", "rating", "rewards"])
def test_a_judgement_beside_a_pair_is_named_as_a_warning(tmp_path, column):
    assert f"WARNING: `{column}` (1 rows) may judge" in told(tmp_path, {**PAIR, column: 0})
    with pytest.raises(UserError, match=f'"answers" would be read as the best answer first, .*"{column}"'):
        reading(tmp_path, {"prompt": "p", "answers": ["x", "y"], column: [0, 1]})


@pytest.mark.parametrize(
    ("high", "low"),
    [
        ("score_chosen", "score_rejected"),
        ("chosen_score", "rejected_score"),
        ("chosen-rating", "rejected-rating"),
    ],
)
def test_scores_that_contradict_the_order_are_refused_and_ties_dropped(tmp_path, high, low):
    with pytest.raises(UserError, match=f'"{high}" must be above "{low}", .*but is 1.0 against 2.0'):
        reading(tmp_path, {**PAIR, high: 1, low: "2"})
    found, findings = reading(tmp_path, {**PAIR, high: 1, low: 1}, {**PAIR, high: 2, low: 1})
    assert (len(found), found[0].margin, findings.dropped) == (1, 0.0, {"ties": 1})
    with pytest.raises(UserError, match=f'"{high}" must be a finite number'):
        reading(tmp_path, {**PAIR, high: 1e300, low: 1})


@pytest.mark.parametrize("label", [False, 0, "false", "False", "0", 0.0])
def test_an_answer_that_is_labelled_bad_is_left_out_and_counted(tmp_path, label):
    rows = [
        {**EXAMPLE, "label": label},
        {**EXAMPLE, "label": not label or label == "0"},
        {**EXAMPLE, "label": None},
    ]
    rows[1]["label"] = True
    found, findings = reading(tmp_path, *rows)
    assert [row.answers for row in found] == [(), ("c",), ("c",)]
    assert findings.lines() == [
        "1 rows have answers labelled bad: no step learns those, step 3 has their prompts"
    ]


@pytest.mark.parametrize("label", ["good", 2, [True], "math"])
def test_a_label_that_is_neither_good_nor_bad_is_named(tmp_path, label):
    with pytest.raises(UserError, match='"label" must be true or false'):
        reading(tmp_path, {**EXAMPLE, "label": label})


@pytest.mark.parametrize(
    ("answer", "answers"),
    [(3, ("3",)), (2.5, ("2.5",)), ("7", ("7",)), (True, ()), (["3", "4"], ()), ({"a": 1}, ())],
)
def test_answers_may_be_numbers_and_what_is_no_text_is_learned_by_no_step(tmp_path, answer, answers):
    (found,), findings = reading(tmp_path, {"question": "q", "answer": answer})
    assert found.answers == answers
    assert findings.unlearned.total() == (not answers)
    for nothing in (None, "", float("nan")):
        with pytest.raises(UserError, match='"answer"'):
            reading(tmp_path, {"question": "q", "answer": nothing})


def test_bad_rows_are_left_out_and_counted_by_reason(tmp_path):
    rows = [
        {**PAIR, "chosen": ""},
        PAIR,
        {**PAIR, "chosen": 3},
        {**PAIR, "chosen": 4},
        {"prompt": "p"},
        ["x"],
    ]
    form = Format(drop_bad_rows=True)
    found, findings = reading(tmp_path, *rows, form=form)
    assert len(found) == 1
    assert findings.bad == {
        '"chosen" is empty': 1,
        '"chosen" must be a string': 2,
        'the row has no "chosen"': 1,
        "the row is no JSON object": 1,
    }
    assert [place.split(": ")[0].rpartition(":")[2] for place in findings.bad_places] == [
        "1",
        "3",
        "4",
        "5",
        "6",
    ]
    assert Findings.of_json(json.loads(json.dumps(findings.as_json()))) == findings
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .* leave out all such rows with --on_bad_row drop"):
        reading(tmp_path, *rows)


@pytest.mark.parametrize(
    ("name", "lines", "reason"),
    [
        ("x.jsonl", [json.dumps(PAIR), '{"prompt": "cut', json.dumps(PAIR)], "not a JSON object on one line"),
        ("x.csv", ["prompt,chosen,rejected", "p,good,bad", "p,good", "p,good,bad"], "the row has N fields"),
    ],
)
def test_lines_that_a_file_cannot_give_are_bad_rows_too(tmp_path, name, lines, reason):
    (tmp_path / name).write_text("\n".join(lines))
    source, findings = open_source(str(tmp_path / name)), Findings()
    found = list(read_comparisons(source, source.training, Format(drop_bad_rows=True), findings))
    assert [comparison.answers for comparison in found] == [("good", "bad")] * 2
    assert [(why.startswith(reason), count) for why, count in findings.bad.items()] == [(True, 1)]
    with pytest.raises(UserError, match=rf"{name}:\d: {reason[:11]}.* leave out all such rows with"):
        list(read_comparisons(source, source.training, Format(), Findings()))


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
