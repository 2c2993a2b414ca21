"""The log file of a run."""

import os

from dschat.console import log_file
from dschat.console.log_file import Log


def test_what_was_printed_before_the_file_is_known_comes_first(tmp_path):
    log = Log()
    log.add("early   ")
    log.open(tmp_path / "log.txt")
    log.add("later é \ud800")
    head, *lines = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert head.startswith("== ")
    assert head.endswith(f"process {os.getpid()}")
    assert lines == ["early", "later é \\ud800"]  # half of a surrogate pair is no UTF-8


def test_only_the_last_early_lines_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(log_file, "NUM_EARLY_LINES", 2)
    log = Log()
    for line in ("one", "two", "three"):
        log.add(line)
    log.open(tmp_path / "log.txt")
    assert (tmp_path / "log.txt").read_text().splitlines()[1:] == ["two", "three"]


def test_a_file_that_cannot_be_written_is_named_once_and_ends_nothing(tmp_path, capsys):
    log = Log()
    log.open(tmp_path / "missing" / "log.txt")
    log.add("a line")
    assert "cannot be written (No such file or directory): the console alone" in capsys.readouterr().out


def test_a_second_file_is_not_opened(tmp_path):
    log = Log()
    log.open(tmp_path / "first.txt")
    log.open(tmp_path / "second.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["first.txt"]
