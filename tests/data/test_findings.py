"""What reading finds beside the comparisons is counted and put into words."""

import pytest
from written_rows import PAIR, reading, told

from dschat.data.findings import HARMLESS
from dschat.data.reading import Format
from dschat.errors import UserError


def test_columns_that_nothing_reads_are_named_with_their_rows(tmp_path):
    text = told(tmp_path, {**PAIR, "thought": "hm", "id": 1}, {**PAIR, "thought": " ", "tags": ["x"]}, PAIR)
    assert text == "2 columns are not read: `thought` (1 rows), `tags` (1 rows)"


@pytest.mark.parametrize("column", HARMLESS[:3] + ["Source", "URL"])
def test_harmless_columns_are_not_named(tmp_path, column):
    assert told(tmp_path, {**PAIR, column: "x"}) == ""


@pytest.mark.parametrize("nothing", [None, "", " ", [], {}, float("nan")])
def test_a_column_that_holds_nothing_is_not_named(tmp_path, nothing):
    assert told(tmp_path, {**PAIR, "thought": nothing}) == ""


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
