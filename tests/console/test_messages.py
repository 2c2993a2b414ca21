"""Messages to users: on which rank, where, and with which words in front."""

import io
import sys

import pytest
from tqdm import tqdm

from dschat.console import messages


def test_levels_are_words_in_front(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    messages.info("loading")
    messages.note("three rows are short.")
    messages.warning("no more curves.")
    assert capsys.readouterr().out.splitlines() == [
        "loading",
        "note: three rows are short.",
        "WARNING: no more curves.",
    ]


@pytest.mark.parametrize("level", [messages.info, messages.note, messages.warning])
def test_other_ranks_are_silent_unless_a_message_is_their_own(capsys, monkeypatch, level):
    monkeypatch.setenv("RANK", "1")
    level("hello")
    assert capsys.readouterr().out == ""
    level("hello", every_rank=True)
    assert capsys.readouterr().out.endswith("hello\n")


def test_why_a_program_ends_is_on_stderr_of_any_rank(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    messages.to_stderr("error: no more data")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: no more data\n")


def test_a_message_stands_on_a_line_of_its_own_beside_a_progress_bar(monkeypatch):
    monkeypatch.setattr(sys, "stdout", shown := io.StringIO())
    monkeypatch.setattr(sys, "stderr", shown)
    bar = tqdm(total=2, file=sys.stderr, desc="bar")
    messages.info("beside it")
    bar.close()
    assert "beside it" in shown.getvalue().replace("\r", "\n").splitlines()


def test_a_message_is_out_before_the_bar_is_drawn_again(monkeypatch):
    """Also where stdout has a buffer of its own."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(shown)))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(shown, write_through=True))
    with tqdm(total=2, file=sys.stderr, desc="bar"):
        messages.info("beside it")
    assert "beside it" in shown.getvalue().decode().replace("\r", "\n").splitlines()
