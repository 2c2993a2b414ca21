"""Rows with one answer or none: what a label and an answer that is no text make of them."""

import pytest
from written_rows import EXAMPLE, reading

from dschat.errors import UserError


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
