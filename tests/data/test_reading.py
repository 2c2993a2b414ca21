"""What a row holds is read, known to be harmless, or named."""

import json

import pytest
from written_rows import EXAMPLE, PAIR, reading, told

from dschat.data.findings import Findings
from dschat.data.reading import Format, read_comparisons
from dschat.data.sources import open_source
from dschat.errors import UserError


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
