"""No two runs write into one folder: who is told what, and when."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dschat.arguments import RunArguments
from dschat.distributed.process_wide import process_wide
from dschat.errors import UserError
from dschat.runs import lock
from dschat.runs.lock import LOCK, claim, has_begun_before, note_begun
from dschat.runs.output_folder import check_free

# A run that claims its folder; "forked" leaves a process that outlives it, as those of a pool may.
RUN = """
import os, signal, sys
from pathlib import Path
from dschat.runs.lock import claim, note_stopping
claim(Path(sys.argv[1]))
if "forked" in sys.argv and os.fork() == 0:
    os.write(1, b"%d\\n" % os.getpid())
    sys.stdin.read()
signal.signal(signal.SIGTERM, lambda *_: (note_stopping(), os.write(1, b"asked\\n")))
os.write(1, b"%d\\n" % os.getpid())
sys.stdin.read()
"""


def start(folder: Path, *how: str, **environment: str) -> subprocess.Popen:
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder), *how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root), **environment},
    )


def test_a_live_run_is_named_at_once_and_its_end_frees_the_folder(tmp_path, capsys):
    with start(tmp_path, "forked") as other:
        processes = [int(other.stdout.readline()) for _ in range(2)]
        begin = time.monotonic()
        named = rf"another run is writing into it \(process {other.pid} on .*, since 20.*\); wait for its end"
        with pytest.raises(UserError, match=named):
            claim(tmp_path)
        assert time.monotonic() - begin < 10  # PATIENCE with a run that is ending is a minute
        with pytest.raises(UserError, match=named):  # before models and data are looked at
            check_free(RunArguments(output_dir=str(tmp_path)))
        assert capsys.readouterr().out == ""
        other.kill()
        other.wait()
        claim(tmp_path)
        (left,) = set(processes) - {other.pid}
        os.kill(left, signal.SIGKILL)
    claim(tmp_path)  # a process that runs twice is no other


def test_one_that_was_asked_to_stop_is_waited_for(tmp_path, capsys, monkeypatch):
    with start(tmp_path) as other:
        other.stdout.readline()
        other.terminate()
        assert other.stdout.readline() == b"asked\n"
        monkeypatch.setattr(lock, "PATIENCE", 0.3)
        with pytest.raises(UserError, match="another run is writing"):
            claim(tmp_path)
        monkeypatch.undo()
        assert f"(process {other.pid} on" in (said := capsys.readouterr().out)
        assert "is ending" in said
        other.stdin.close()
        claim(tmp_path)


def test_one_whose_launcher_is_gone_is_waited_for(tmp_path, monkeypatch):
    launcher = subprocess.Popen(["true"])
    launcher.wait()
    with start(tmp_path, TORCHELASTIC_RUN_ID="x") as other:
        other.stdout.readline()
        holder = lock._read_file(tmp_path / LOCK)
        assert holder.launcher == os.getpid()
        assert not holder.is_ending
        monkeypatch.setattr(lock, "is_gone", lambda pid: pid == os.getpid())
        assert holder.is_ending
        other.stdin.close()


def test_a_lock_that_says_nothing_is_refused_soon(tmp_path):
    with start(tmp_path) as other:
        other.stdout.readline()
        os.truncate(tmp_path / LOCK, 0)
        begin = time.monotonic()
        with pytest.raises(UserError, match="another run is writing into it; wait"):
            claim(tmp_path)
        assert time.monotonic() - begin < 5
        other.stdin.close()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("someone's own")
    (tmp_path / LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic links"):
        claim(tmp_path)
    assert (tmp_path / "mine").read_text() == "someone's own"


@pytest.mark.parametrize("run_id", ["none", "one"])
def test_a_launch_that_is_started_again_knows_whether_it_had_begun(run_id, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    claim(tmp_path)
    assert not has_begun_before(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not has_begun_before(tmp_path)  # what refused the first attempt refuses the second
    note_begun(tmp_path)
    assert has_begun_before(tmp_path)
    os.close(process_wide(lock.HeldLocks).pop(tmp_path.resolve()).descriptor)
    claim(tmp_path)
    assert has_begun_before(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another launch")
    assert not has_begun_before(tmp_path)
