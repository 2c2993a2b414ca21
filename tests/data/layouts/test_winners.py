"""Two answers and a winner: whatever it is called, the pair is right, dropped or refused, never inverted."""

import json

import pytest

from dschat.data.cells import BadRow, Columns, DroppedRow
from dschat.data.comparisons import Comparison, Turn
from dschat.data.layouts import recognise

TWO = {"prompt": "p", "answer_a": "x", "answer_b": "y"}
FIRST, SECOND = Comparison("p", ("x", "y")), Comparison("p", ("y", "x"))


def read(row):
    found = recognise(row)
    assert found.name == "two_answers"
    return found.read(row)


def said(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.mark.parametrize(
    ("winner", "expected"),
    [
        *[
            (word, FIRST)
            for word in ("a", "A", " a ", "model_a", "Model A", "answer_a", "Response A", "assistant_a")
        ],
        *[(word, FIRST) for word in ("left", "first", "x", "[[A]]", "gpt", "option-a")],
        *[(word, SECOND) for word in ("b", "model_b", "answer_b", "right", "second", "y", "[[B]]", "llama")],
    ],
)
@pytest.mark.parametrize(
    "column", ["winner", "preference", "choice", "better", "label", "chosen", "comparison"]
)
def test_the_better_answer_is_told_by_letter_name_side_text_or_model(column, winner, expected):
    assert read({**TWO, "model_a": "gpt", "model_b": "llama", column: winner}) == expected


@pytest.mark.parametrize(
    "columns",
    [
        ("response_0", "response_1"),
        ("response_1", "response_2"),
        ("Response 1".lower().replace(" ", "_"), "response_2"),
        ("answer1", "answer2"),
        ("answerA", "answerB"),
        ("completion_a", "completion_b"),
        ("output_1", "output_2"),
        ("candidate-a", "candidate-b"),
    ],
)
def test_answers_are_known_by_their_usual_names_and_numbers(columns):
    for better, expected in zip(columns, (FIRST, SECOND), strict=True):
        side = better[-1]
        row = {"prompt": "p", columns[0]: "x", columns[1]: "y"}
        winners = [better, side, side.upper(), f"answer_{side}"]
        if side.isdigit():
            winners += [
                int(side),
                float(side),
                f"{side}.0",
            ]  # a table of numbers has floats where some are null
        for winner in winners:
            assert read({**row, "winner": winner}) == expected, winner


@pytest.mark.parametrize(
    "winner", ["tie", "Tie", "tie (bothbad)", "both", "draw", "neither", "[[C]]", "both_bad"]
)
def test_ties_are_dropped(winner):
    with pytest.raises(DroppedRow, match="ties"):
        read({**TWO, "winner": winner})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        # Nobody knows whether numbers count from 0 or from 1 where the answers have letters.
        *[
            ({**TWO, "winner": w}, '"winner" names neither answer: it is')
            for w in (0, 1, 2, "1", True, "c.", ["a"])
        ],
        *[({**TWO, "winner": w}, '"winner" is empty') for w in (None, "", " ", float("nan"))],
        (
            {"prompt": "p", "answer_a": "B", "answer_b": "A", "winner": "A"},
            "could be either answer: it is str: 'A'",
        ),
        ({"prompt": "p", "answer_1": "x", "answer_2": "y", "preference": 0}, '"preference" names neither'),
        ({"prompt": "p", "answer_0": "x", "answer_1": "y", "label": 2}, '"label" names neither'),
        ({**TWO, "winner": "a", "preference": "b"}, '"winner" and "preference" name different answers'),
        (
            {**TWO, "winner": "a", "score_a": 1, "score_b": 2},
            '"score_a" must be above "score_b".* 1.0 against 2.0',
        ),
        (TWO, 'two answers, "answer_a" and "answer_b", but no column that is known to say which is better'),
        ({**TWO, "answer_b": "", "winner": "a"}, '"answer_b" is empty'),
        ({**TWO, "winner_model_a": 1, "winner_model_b": 1}, "one must be 1 and the others 0"),
        ({**TWO, "overall_preference": "strong"}, '"overall_preference" must be a number'),
    ],
)
def test_what_does_not_say_which_is_better_is_an_error(row, message):
    with pytest.raises(BadRow, match=message):
        read(row)


def test_a_further_verdict_that_agrees_is_read():
    row = Columns({**TWO, "winner": "a", "preference": "answer_a"})
    assert read(row) == FIRST
    assert row.asked >= {"winner", "preference"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [((1, 0, 0), FIRST), ((0, 1, 0), SECOND), (("0", "1", "0"), SECOND), ((0.0, 1.0, 0.0), SECOND)],
)
def test_one_hot_winners_are_read_with_prompts_as_lists_in_text(values, expected):
    names = ("winner_model_a", "winner_model_b", "winner_tie")
    row = {"id": 1, "prompt": '["p"]', "response_a": '["x"]', "response_b": '["y"]'}
    comparison = read({**row, **dict(zip(names, values, strict=True))})
    assert comparison == Comparison((Turn("user", "p"),), expected.answers)
    with pytest.raises(DroppedRow, match="ties"):
        read({**row, **dict(zip(names, (0, 0, 1), strict=True))})


def test_rounds_in_lists_are_one_conversation():
    row = {"prompt": ["p", "q"], "response_a": ["x", "y"], "response_b": ["x", "z"], "winner": "model_b"}
    asked = (Turn("user", "p"), Turn("assistant", "x"), Turn("user", "q"))
    assert read(row) == Comparison(asked, ("z", "y"))
    with pytest.raises(DroppedRow, match="part before their last answer"):
        read({**row, "response_b": json.dumps(["w", "z"])})


def test_conversations_of_an_arena_are_compared_by_their_last_answer():
    row = {"question_id": 1, "model_a": "g", "model_b": "l", "winner": "model_b"}
    row |= {"conversation_a": said("p", "x"), "conversation_b": said("p", "y")}
    assert read(row) == Comparison((Turn("user", "p"),), ("y", "x"))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"overall_preference": -2}, FIRST),
        ({"preference_strength": "3"}, SECOND),
        ({"score_a": 2, "score_b": 1}, FIRST),
        ({"answer_a_rating": "1", "answer_b_rating": "4.5"}, SECOND),
    ],
)
def test_numbers_tell_the_better_answer(columns, expected):
    assert read({**TWO, **columns}) == expected
    with pytest.raises(DroppedRow, match="ties"):
        read({**TWO, **dict.fromkeys(columns, 0)})


def test_prompts_have_their_usual_names_and_columns_beside_them():
    row = {"instruction": "i", "input": "x", "system": "s", "output_1": "1", "output_2": "2", "preference": 2}
    assert read(row) == Comparison((Turn("system", "s"), Turn("user", "i\n\nx")), ("2", "1"))
    row = {"question": "q", "response_0": "x", "response_1": "y", "better_response_id": 1, "margin": "0.5"}
    assert read(row) == Comparison("q", ("y", "x"), margin=0.5)


def test_options_of_a_quiz_are_no_answers_of_a_model():
    row = {"question": "q", "option_a": "x", "option_b": "y", "answer": "a"}
    assert recognise(row).name == "question_answer"
