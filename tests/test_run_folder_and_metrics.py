import errno
import json
import os
import signal
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dschat import run_folder
from dschat.arguments import RunArguments, parse_arguments
from dschat.errors import UserError
from dschat.metrics import MetricsLogger
from dschat.run_folder import check_run_folder, read_summary, start_run, write_summary


def arguments(folder) -> object:
    return parse_arguments("sft", ["--model_name_or_path", "m", "--output_dir", str(folder)])


def test_a_new_run_forgets_the_figures_of_the_old_one_once_it_starts(tmp_path):
    write_summary(str(tmp_path), {"step": "sft"})
    old_curve = tmp_path / "tensorboard" / "events.out.tfevents.1"
    old_curve.parent.mkdir()
    old_curve.write_text("")
    check_run_folder(arguments(tmp_path).run)
    assert read_summary(tmp_path) == {"step": "sft"}  # the input may still turn out to be bad
    start_run(arguments(tmp_path))
    assert read_summary(tmp_path) is None
    assert not old_curve.exists()
    assert json.loads((tmp_path / "arguments.json").read_text())["model"]["model_name_or_path"] == "m"


def test_a_new_folder_is_its_owners_alone_and_an_older_one_stays_as_it_is(tmp_path):
    (tmp_path / "older").mkdir()
    (tmp_path / "older").chmod(0o755)  # whatever the umask
    for name, mode in {"new": 0o700, "older": 0o755}.items():
        check_run_folder(arguments(tmp_path / name).run)
        assert (tmp_path / name).stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("flag", ["--output_dir", "--tensorboard_path"])
def test_a_folder_that_cannot_be_made_is_named(flag, tmp_path):
    (tmp_path / "file").write_text("")
    args = parse_arguments("sft", ["--model_name_or_path", "m", flag, str(tmp_path / "file" / "out")])
    with pytest.raises(UserError, match=rf"{flag} .*file/out cannot be written"):
        check_run_folder(args.run)


HOLD = """
import fcntl, os, sys
file = open(sys.argv[1], "ab")
fcntl.lockf(file, fcntl.LOCK_EX)
if os.fork() == 0:  # a process that outlives the run, as those of a pool may
    os.write(1, b"%d\\n" % os.getpid())
    sys.stdin.read()
os.write(1, b"%d\\n" % os.getpid())
sys.stdin.read()
"""


def test_two_runs_do_not_write_into_one_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_folder, "PATIENCE", 0.3)
    command = [sys.executable, "-c", HOLD, str(tmp_path / run_folder.LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        processes = [int(other.stdout.readline()) for _ in range(2)]
        with pytest.raises(UserError, match=r"--output_dir .* another run has been writing into it"):
            check_run_folder(arguments(tmp_path).run)
        assert "note: another run is writing into" in capsys.readouterr().out
        other.kill()
        other.wait()
        check_run_folder(arguments(tmp_path).run)
        (left,) = set(processes) - {other.pid}
        os.kill(left, signal.SIGKILL)
    check_run_folder(arguments(tmp_path).run)  # a process that runs twice is no other


def logger(folder, *, is_main_process=True) -> MetricsLogger:
    run = RunArguments(output_dir=str(folder))
    return MetricsLogger(run, total_steps=2, description="test", is_main_process=is_main_process)


def test_metrics_are_one_object_a_line_and_the_same_in_tensorboard(tmp_path):
    metrics = logger(tmp_path)
    metrics.log(1, show=("loss",), loss=2.5, worst=float("inf"))
    metrics.advance()
    metrics.log(2, loss=1.5)
    metrics.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 2.5, "worst": None}, {"step": 2, "loss": 1.5}]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 1.5)]


class Room:
    """A file on a disk with room for so many bytes, and for more after a while."""

    def __init__(self, path, room: int) -> None:
        self.file, self.room = path.open("ab", buffering=0), room

    def write(self, data: bytes) -> int:
        part = data[: self.room]
        if not part:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(part)
        return self.file.write(part)

    def close(self) -> None:
        self.file.close()


def test_lines_that_find_no_room_are_kept_until_there_is_some(tmp_path, capsys):
    metrics = logger(tmp_path)
    metrics._lines = disk = Room(tmp_path / "metrics.jsonl", room=30)
    for step in (1, 2, 3):
        metrics.log(step, loss=2.5)
    assert capsys.readouterr().out.count("WARNING: metrics.jsonl cannot be written: [Errno 28]") == 1
    disk.room = 1000
    metrics.flush()
    metrics.log(4, loss=2.5)
    metrics.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "loss": 2.5} for step in (1, 2, 3, 4)]


@pytest.mark.parametrize("num_steps", [1, 3])  # told when the file is closed, or at a later step
def test_a_full_disk_ends_tensorboard_alone_and_in_one_line(tmp_path, capsys, monkeypatch, num_steps):
    (tmp_path / "tensorboard").mkdir()
    metrics = logger(tmp_path)
    worker = metrics._writer._get_file_writer().event_writer._async_writer._worker
    monkeypatch.setattr(worker._record_writer._writer, "write", Room(tmp_path / "full", room=0).write)
    for step in range(1, num_steps + 1):
        metrics.log(step, loss=2.5)
        worker.join(timeout=5 if step == 1 else 0)
    metrics.close()
    told = capsys.readouterr()
    assert told.out.count("WARNING: no more curves for TensorBoard: [Errno 28] No space left on device") == 1
    assert "Traceback" not in told.err
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == num_steps


def test_other_ranks_write_nothing(tmp_path):
    metrics = logger(tmp_path, is_main_process=False)
    metrics.log(1, show=("loss",), loss=2.5)
    metrics.say("nothing")
    metrics.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "actor"])
def test_the_model_that_a_run_starts_from_is_not_overwritten(tmp_path, name):
    (tmp_path / "out" / "actor").mkdir(parents=True)
    run = arguments(tmp_path / "out").run
    check_run_folder(run, "some/hub-id", str(tmp_path))
    with pytest.raises(UserError, match=r"--output_dir .* would overwrite the model"):
        check_run_folder(run, str(tmp_path / "out" / name))
