"""How a program starts and ends."""

import errno
import os
import sys

import pytest
from safetensors import SafetensorError
from tqdm import tqdm

from dschat.errors import UserError
from dschat.program import readable_errors


def test_a_rank_that_is_no_number_is_named_before_anything_reads_it(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(SystemExit) as ended, readable_errors():
        pass
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: RANK='one' must be a whole number; correct it or unset it.\n"
    monkeypatch.setenv("RANK", " ")
    with readable_errors():
        assert "RANK" not in os.environ


def test_the_last_message_stands_in_a_line_of_its_own_beside_a_progress_bar(capsys):
    bar = tqdm(total=2, file=sys.stderr)
    with pytest.raises(SystemExit), readable_errors():
        raise UserError("no more data")
    bar.close()
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert "error: no more data" in lines


@pytest.mark.parametrize(("error", "code"), [(UserError("give another file"), 2), (KeyboardInterrupt(), 130)])
def test_an_error_for_people_is_one_line_and_an_exit_code(error, code, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as ended, readable_errors():
        raise error
    assert ended.value.code == code
    assert capsys.readouterr().err.strip() in ("error: give another file", "interrupted")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "out/summary.json"),
        OSError(errno.EROFS, "Read-only file system"),
        SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
    ],
)
def test_a_disk_that_takes_no_more_is_no_bug(error, capsys):
    with pytest.raises(SystemExit) as ended, readable_errors():
        raise error
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: nothing more can be written: ")
    assert "--resume_from_checkpoint latest" in told


def test_debug_and_bugs_keep_their_traceback():
    with pytest.raises(UserError), readable_errors(debug=True):
        raise UserError("x")
    with pytest.raises(ZeroDivisionError), readable_errors():
        raise ZeroDivisionError
