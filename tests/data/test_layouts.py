import pytest

from dschat.data.comparisons import Comparison
from dschat.data.layouts import BadRow, DroppedRow, answers_to_a_prompt, recognise, whole_dialogues

TURN = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Sum?\n\nAssistant:"


def test_three_strings_are_taken_as_they_are():
    row = {"prompt": " P ", "chosen": "good\n", "rejected": "bad", "id": 7}
    assert recognise(row)(row) == Comparison(" P ", "good\n", "bad")


def test_dialogues_are_cut_after_their_last_assistant_and_keep_the_space():
    row = {"chosen": TURN + " Two.", "rejected": TURN + " Three."}
    assert recognise(row)(row) == Comparison(TURN, " Two.", " Three.")


def test_an_answer_of_one_space_is_an_answer_as_in_hh():
    assert whole_dialogues({"chosen": TURN + " ", "rejected": TURN + " x"}).chosen == " "


def test_dialogues_with_equal_answers_keep_their_whole_prompt():
    assert whole_dialogues({"chosen": TURN + " x", "rejected": TURN + " x"}) == Comparison(TURN, " x", " x")


@pytest.mark.parametrize(
    ("rejected", "reason"),
    [
        ("\n\nHuman: Hi\n\nAssistant: Go away", "part before"),
        (TURN.replace("Hello", "Hey") + " Three.", "part before"),
        (TURN + " Three.\n\nHuman: Thanks", "end with a question"),
    ],
)
def test_dialogues_without_a_common_prompt_are_dropped(rejected, reason):
    with pytest.raises(DroppedRow, match=reason):
        whole_dialogues({"chosen": TURN + " Two.", "rejected": rejected})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, '"chosen" must be a string, but is null'),
        ([{"role": "user"}], '"chosen" must be a string, but is a list'),
        ({"text": "x"}, '"chosen" must be a string, but is an object'),
        (3, '"chosen" must be a string, but is a number: 3'),
        ("", '"chosen" is empty'),
        ("half \ud83d", '"chosen" holds half of a surrogate pair at character 6'),
    ],
)
def test_a_value_that_is_no_text_is_named(value, message):
    with pytest.raises(BadRow, match=message):
        answers_to_a_prompt({"prompt": "p", "chosen": value, "rejected": "b"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, 'the row has no "rejected"; its columns are: prompt, chosen'),
        (
            {"question": "q", "answer": "a"},
            "the known layouts are: prompt, chosen, rejected; or chosen, rejected",
        ),
        ({}, "its columns are: none"),
    ],
)
def test_unknown_columns_are_named_with_what_is_missing(row, message):
    with pytest.raises(BadRow, match=message):
        recognise(row)


def test_a_row_that_lacks_a_later_column_says_which():
    with pytest.raises(BadRow, match='the row has no "rejected"'):
        answers_to_a_prompt({"prompt": "p", "chosen": "a"})


@pytest.mark.parametrize(
    ("chosen", "message"),
    [("Just text", "holds no .*Assistant"), (TURN, '"chosen" has no answer after its last')],
)
def test_a_dialogue_without_an_answer_is_an_error(chosen, message):
    with pytest.raises(BadRow, match=message):
        whole_dialogues({"chosen": chosen, "rejected": TURN + " x"})
