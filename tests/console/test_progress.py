"""Progress on a terminal, and in plain lines without one."""

import io
import sys

import pytest

from dschat.console import messages, progress
from dschat.console.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_there_are_lines_now_and_then_and_no_carriage_return(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    with Progress(total=3, desc="SFT") as bar:
        for loss in ("6.5", "6.4"):
            bar.set_postfix_str(f"loss {loss}", refresh=False)
            bar.update()
        messages.info("beside it")
    told = capsys.readouterr()
    first, second = told.err.splitlines()  # of the end there is nothing new to say
    assert first.startswith("SFT 1 of 3, 00:00, ")
    assert first.endswith(" left, loss 6.5")
    assert second.endswith(" left, loss 6.4")
    assert "\r" not in told.err
    assert told.out == "beside it\n"


def test_a_short_one_says_its_end_alone(capsys):
    assert list(Progress(range(5), desc="reference")) == [0, 1, 2, 3, 4]
    assert [line[:16] for line in capsys.readouterr().err.splitlines()] == ["reference 5 of 5"]


def test_what_ends_before_its_delay_says_nothing(capsys):
    assert list(Progress(iter("ab"), desc="reading", unit=" rows", delay=9)) == ["a", "b"]
    assert capsys.readouterr().err == ""


def test_an_unknown_end_has_no_time_left(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    assert list(Progress(iter("ab"), desc="reading", unit=" rows")) == ["a", "b"]
    assert capsys.readouterr().err.splitlines()[-1].startswith("reading 2 rows, 00:00")


@pytest.mark.parametrize("rank", [True, False])
def test_a_terminal_has_a_bar_with_time_left_on_one_rank(monkeypatch, rank):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(total=2, desc="PPO", disable=not rank, mininterval=0) as bar:
        bar.set_postfix_str("score 1.5", refresh=False)
        bar.update()
        bar.update()
    last = terminal.getvalue().split("\r")[-1]
    assert ("PPO 2/2 |" in last and "left, score 1.5" in last) if rank else terminal.getvalue() == ""
