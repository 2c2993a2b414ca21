"""Messages for people: one line, whatever is quoted in them."""

import pickle

import pytest

from dschat.errors import LONGEST_MESSAGE, UserError


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("a.jsonl:3: \tno.\n  Correct it.\n", r"a.jsonl:3: \tno. Correct it."),
        ("the key is \x1b[31mred\x00", r"the key is \x1b[31mred\x00"),
        ("half a pair \ud800, back \u202e", r"half a pair \ud800, back \u202e"),
        ("茶 é 😀", "茶 é 😀"),
    ],
)
def test_a_message_is_one_line_that_steers_no_terminal(message, shown):
    assert str(UserError(message)) == shown


def test_of_a_long_message_beginning_and_end_are_kept_and_it_travels_between_processes():
    error = UserError("--flag " + "x" * 5000 + " is no number.")
    # 7 + 5,000 + 14 characters; 975 from either end stay.
    assert str(error) == "--flag " + "x" * 968 + " ... (3,071 characters) ... " + "x" * 961 + " is no number."
    assert len(str(error)) <= LONGEST_MESSAGE
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_details_are_lines_of_their_own_and_travel_too():
    error = UserError("out of\nmemory:", "  12 GiB  weights", "What helps:\nless")
    assert str(error) == "out of memory:\n  12 GiB  weights\nWhat helps: less"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
