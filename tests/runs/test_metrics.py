"""Figures in metrics.jsonl and TensorBoard, and what a full disk does to them."""

import errno
import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dschat.arguments import RunArguments
from dschat.runs.metrics import MetricsLogger


def logger(folder, *, is_main_process=True) -> MetricsLogger:
    run = RunArguments(output_dir=str(folder))
    return MetricsLogger(run, "sft", total_steps=2, description="test", is_main_process=is_main_process)


def test_metrics_are_one_object_a_line_and_the_same_in_tensorboard(tmp_path):
    metrics = logger(tmp_path)
    metrics.log(1, show=("loss",), loss=2.5, grad_norm=float("inf"))
    metrics.advance()
    metrics.log(2, loss=1.5)
    metrics.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 2.5, "grad_norm": None}, {"step": 2, "loss": 1.5}]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.5), (2, 1.5)]


def test_a_metric_without_an_entry_in_the_registry_is_a_bug(tmp_path):
    metrics = logger(tmp_path)
    with pytest.raises(KeyError, match="'score' of step 'sft' has no entry"):
        metrics.log(1, score=1.0)
    metrics.close()


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
    metrics.close()
    assert list(tmp_path.iterdir()) == []
