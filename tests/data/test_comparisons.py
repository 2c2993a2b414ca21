import json
import math
from itertools import pairwise

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dschat.data.comparisons import (
    ROWS_AT_ONCE,
    SCHEMA,
    Comparison,
    Turn,
    answer_pairs,
    pack_prompt,
    prompt_key,
    unpack_answers,
    unpack_prompt,
    write_comparisons,
)

CONVERSATION = (Turn("system", "Be brief."), Turn("user", "Grüße 😀?"))
CALL = Turn("assistant", "", False, '{"tool_calls": [{"function": {"name": "f"}}]}')


def written(path):
    return pa.ipc.open_stream(path).read_all()


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (None, ["ab", "ac", "ad", "bc", "bd", "cd"]),  # 4 choose 2
        ((0, 1, 2, 3), ["ab", "ac", "ad", "bc", "bd", "cd"]),
        ((0, 1, 1, 2), ["ab", "ac", "ad", "bd", "cd"]),  # b and c tie
        ((0, 0, 1, 1), ["ac", "ad", "bc", "bd"]),
        ((-1.5, -1.5, -1.5, -1.5), []),
    ],
)
def test_the_pairs_are_k_choose_2_less_the_ties(ranks, expected):
    assert answer_pairs("abcd", ranks) == [tuple(pair) for pair in expected]
    assert Comparison("p", tuple("abcd"), ranks).pairs == [tuple(pair) for pair in expected]


@given(st.lists(st.integers(0, 4), max_size=8))
def test_there_are_as_many_pairs_as_answers_of_different_rank(ranks):
    ranks, k = sorted(ranks), len(ranks)
    ties = sum(ranks.count(rank) * (ranks.count(rank) - 1) // 2 for rank in set(ranks))
    pairs = answer_pairs(range(k), ranks)
    assert len(pairs) == k * (k - 1) // 2 - ties
    assert all(ranks[better] < ranks[worse] for better, worse in pairs)


def test_one_answer_or_none_makes_no_pair():
    assert Comparison("p").pairs == Comparison("p", ("a",)).pairs == []


@pytest.mark.parametrize(
    "settings",
    [
        {"ranks": (0.0,)},
        {"ranks": (1.0, 0.0)},  # the best is first
        {"margin": math.nan},
        {"margin": math.inf},
    ],
)
def test_a_comparison_that_contradicts_itself_is_a_bug(settings):
    with pytest.raises(AssertionError):
        Comparison("p", ("a", "b"), **settings)


FIELDS = st.sampled_from(["", '{"name": "Bo"}', '{"id": 7}'])
TURNS = st.builds(
    Turn,
    st.sampled_from(["system", "user", "assistant", "tool"]),
    st.text(min_size=1),
    st.sampled_from([None, False, True]),
    FIELDS,
)
PROMPTS = st.text(min_size=1) | st.lists(TURNS, min_size=1, max_size=4).map(tuple)


@pytest.mark.slow
@given(PROMPTS)
def test_a_prompt_survives_packing(prompt):
    unpacked = unpack_prompt(pack_prompt(prompt))
    assert unpacked == prompt
    assert isinstance(unpacked, str) or all(isinstance(turn, Turn) for turn in unpacked)


CONTENT = st.text(min_size=1).filter(lambda text: text == text.strip() and "Assistant:" not in text)
QUESTIONS = CONTENT | CONTENT.map(lambda text: (Turn("user", text),))
SAID = st.builds(Turn, st.sampled_from(["user", "assistant"]), CONTENT, st.none(), st.just(""))
CONVERSATIONS = st.lists(SAID, min_size=2)


@given(*[QUESTIONS | CONVERSATIONS.map(tuple)] * 2)
def test_equal_prompts_have_equal_keys_and_others_other_keys(one, other):
    def asked(prompt):
        """One question is one prompt, as text and as a message."""
        return (Turn("user", prompt),) if isinstance(prompt, str) else prompt

    assert (prompt_key(one) == prompt_key(other)) == (asked(one) == asked(other))
    assert prompt_key(one) == prompt_key(unpack_prompt(pack_prompt(one))) == prompt_key(asked(one))


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        (" What? \n", [("user", "What?")]),
        ("Human: What?", [("user", "What?")]),
        ("\n\nHuman: What?\n\nAssistant:", [("user", "What?")]),
        (
            "Be brief.\n\nHuman: A?\n\nAssistant: B.\n\nHuman: C?\n\nAssistant: ",
            [("system", "Be brief."), ("user", "A?"), ("assistant", "B."), ("user", "C?")],
        ),
    ],
)
def test_a_dialogue_in_text_has_the_key_of_its_turns(text, turns):
    assert prompt_key(text) == prompt_key(tuple(Turn(*turn) for turn in turns))
    assert prompt_key(text) != prompt_key(text + "\n\nHuman: D?")


def test_plain_prompts_keep_the_keys_and_the_form_that_they_had_before_turns_said_more(tmp_path):
    # Numbers of the version before: the split of data that have no such fields must not change.
    index = write_comparisons(
        [(Comparison(CONVERSATION, (" ja", " nein")), 0, False)], tmp_path / "rows.arrow"
    )
    assert prompt_key(CONVERSATION) == index.keys[0] == 0x323DBAB21F860DC3
    assert index.row_keys[0] == 0xA2EA9CECC9C9B238
    assert pack_prompt(CONVERSATION) == '[["system", "Be brief."], ["user", "Grüße 😀?"]]'
    assert pack_prompt("What?") == '"What?"'


def test_what_a_turn_says_makes_another_prompt_and_marks_and_unknown_fields_do_not():
    question = Turn("user", "What?")
    said = [question, Turn("user", "What?", None, '{"name": "Bo"}'), Turn("tool", "What?")]
    assert len({prompt_key((turn,)) for turn in said}) == 3
    for learn, fields in ((True, ""), (None, '{"emotion": "calm"}')):
        assert prompt_key((Turn("user", "What?", learn, fields),)) == prompt_key((question,))
    assert prompt_key((Turn("tools", "[]"), question)) != prompt_key((question,))


def test_rows_survive_the_file(tmp_path):
    rows = [
        Comparison(CONVERSATION, (" ja", " nein", "\u2028"), (-1.5, -1.5, 0.0)),
        Comparison("What?", (" x\u2028y", " z\n"), margin=0.25),
        Comparison("What?", ("all\0",), learn_all_turns=True),
        Comparison(CONVERSATION),
        Comparison((CALL, *CONVERSATION), ("text", CALL), learn_all_turns=True),
    ]
    write_comparisons([(row, 0, False) for row in rows], tmp_path / "rows.arrow")
    table = written(tmp_path / "rows.arrow")
    assert table.schema == SCHEMA
    for row, kept in zip(rows, table.to_pylist(), strict=True):
        kept |= {
            "prompt": unpack_prompt(kept["prompt"]),
            "answers": tuple(unpack_answers(kept["answers"], kept.pop("answer_turns"))),
            "ranks": kept["ranks"] and tuple(kept["ranks"]),
        }
        assert Comparison(**kept) == row


def test_the_index_tells_rows_and_prompts_apart_and_counts(tmp_path):
    first = Comparison(CONVERSATION, ("a", "b", "c"), (0.0, 1.0, 1.0))
    rows = [
        (first, 0, False),
        (Comparison("What?", ("x",)), 1, True),
        (Comparison(CONVERSATION, ("a", "c", "b"), (0.0, 1.0, 1.0)), 1, False),
        (first, 2, True),
        (Comparison(CONVERSATION, ("a", "b", "c"), (0.0, 1.0, 2.0)), 0, False),
        (Comparison(CONVERSATION, ("a", "b", "c"), (0.0, 1.0, 1.0), margin=0.5), 0, False),
        (Comparison(CONVERSATION), 0, False),
    ]
    index = write_comparisons(rows, tmp_path / "rows.arrow")
    assert len({*index.keys.tolist()}) == 2
    assert index.keys[0] == index.keys[2] != index.keys[1]
    assert index.row_keys[0] == index.row_keys[3]
    assert len({*index.row_keys.tolist()}) == 6
    assert index.sources.tolist() == [0, 1, 1, 2, 0, 0, 0]
    assert index.in_evaluation.tolist() == [False, True, False, True, False, False, False]
    assert index.num_answers.tolist() == [3, 1, 3, 3, 3, 3, 0]
    assert index.num_pairs.tolist() == [2, 0, 2, 2, 3, 2, 0]


def test_nothing_is_written_as_an_empty_table(tmp_path):
    index = write_comparisons([], tmp_path / "rows.arrow")
    assert written(tmp_path / "rows.arrow").num_rows == 0
    assert [(len(column), str(column.dtype)) for column in vars(index).values()] == [
        (0, dtype) for dtype in (*["uint64"] * 4, "int32", "bool", "int32", "int32")
    ]


@pytest.mark.parametrize("count", [ROWS_AT_ONCE, 2 * ROWS_AT_ONCE + 1])
def test_more_rows_than_are_written_at_once_keep_their_order(tmp_path, count):
    rows = ((Comparison(str(i), ("a", "b")), i, False) for i in range(count))
    index = write_comparisons(rows, tmp_path / "rows.arrow")
    prompts = written(tmp_path / "rows.arrow")["prompt"].to_pylist()
    assert [json.loads(prompt) for prompt in prompts] == [str(i) for i in range(count)]
    assert len(set(index.keys.tolist())) == count
    assert all(b - a == 1 for a, b in pairwise(index.sources.tolist()))
