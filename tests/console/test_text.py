"""Text from data and models in a terminal."""

import pytest

from dschat.console.text import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, é, 茶 and 😀", "plain, é, 茶 and 😀"),
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b[2J", r"\x1b[2J"),  # would clear the screen
        ("\u202ecba", r"\u202ecba"),  # would turn the rest of the line around
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),  # a tag, which nothing shows
    ],
)
def test_what_steers_a_terminal_is_escaped(text, shown):
    assert printable(text) == shown


def test_a_message_of_one_line_keeps_no_line_breaks():
    assert printable("a\nb\tc", keep="") == r"a\nb\tc"
