"""Figures in metrics.jsonl and TensorBoard, and what a full disk does to them."""

import errno
import json

import numpy as np
import pytest
from step_flags import STEP3
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dschat.arguments import parse_arguments
from dschat.runs.metrics import MetricsLogger


def logger(folder, *flags, is_main_process=True, steps_done=None, step="sft") -> MetricsLogger:
    models = ["--model_name_or_path=m"] if step == "sft" else STEP3
    description = parse_arguments(step, [*models, f"--output_dir={folder}", *flags]).description
    return MetricsLogger(
        description, total_steps=2, title="test", is_main_process=is_main_process, steps_done=steps_done
    )


def test_metrics_are_one_object_a_line_and_the_same_in_tensorboard(tmp_path):
    metrics = logger(tmp_path)
    metrics.log(1, {"loss": 2.5, "grad_norm": float("inf")})
    metrics.advance()
    metrics.log(2, {"loss": 1.5})
    metrics.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 2.5, "grad_norm": None}, {"step": 2, "loss": 1.5}]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.5), (2, 1.5)]


def test_a_metric_without_an_entry_in_the_registry_is_a_bug(tmp_path):
    metrics = logger(tmp_path)
    with pytest.raises(KeyError, match="'score' of step 'sft' has no entry"):
        metrics.log(1, {"score": 1.0})
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
    metrics._lines.file = disk = Room(tmp_path / "metrics.jsonl", room=30)
    for step in (1, 2, 3):
        metrics.log(step, {"loss": 2.5})
    assert capsys.readouterr().out.count("WARNING: metrics.jsonl cannot be written: [Errno 28]") == 1
    disk.room = 1000
    metrics.flush()
    metrics.log(4, {"loss": 2.5})
    metrics.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "loss": 2.5} for step in (1, 2, 3, 4)]


@pytest.mark.parametrize("num_steps", [1, 3])  # told when the file is closed, or at a later step
def test_a_full_disk_ends_tensorboard_alone_and_in_one_line(tmp_path, capsys, monkeypatch, num_steps):
    (tmp_path / "tensorboard").mkdir()
    metrics = logger(tmp_path)
    worker = metrics._trackers[0].writer._get_file_writer().event_writer._async_writer._worker
    monkeypatch.setattr(worker._record_writer._writer, "write", Room(tmp_path / "full", room=0).write)
    for step in range(1, num_steps + 1):
        metrics.log(step, {"loss": 2.5})
        worker.join(timeout=5 if step == 1 else 0)
    metrics.close()
    told = capsys.readouterr()
    assert (
        told.out.count(
            "WARNING: TensorBoard gets no more metrics: OSError: [Errno 28] No space left on device"
        )
        == 1
    )
    assert "Traceback" not in told.err
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == num_steps


def test_other_ranks_write_nothing(tmp_path):
    metrics = logger(tmp_path, is_main_process=False)
    metrics.log(1, {"loss": 2.5})
    metrics.samples(1, [{"prompt": "a"}])
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def sample(answer: str, kl: float = 0.0) -> dict:
    return {"prompt": "Say | <b>it</b>\n", "answer": answer, "score": 1.5, "kl": kl, "length": 2}


def test_a_resumed_run_has_its_samples_once_and_its_curves_and_histograms_too(tmp_path):
    """Killed after step 3, in a line, and resumed from the checkpoint of step 2, inside of step 3."""
    first = logger(tmp_path, step="rlhf")
    for step in (1, 2, 3):
        first.samples(step, [sample(f"answer {step}"), sample("b", kl=float("nan"))])
        first.histograms(step, {"rollout/scores": np.array([1.0, np.inf, step])})
        first.log(step, {"score": 1.0})
    first.close()
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 3, "prom')
    second = logger(tmp_path, step="rlhf", steps_done=2)
    second.samples(3, [sample("answer 3 again")])
    second.histograms(3, {"rollout/scores": np.array([7.0])})
    second.close()
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 1, 2, 2, 3]
    assert lines[1] == {"step": 1, **sample("b"), "kl": None}
    assert lines[-1]["answer"] == "answer 3 again"
    size = {"histograms": 0, "tensors": 0}
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance=size).Reload()
    histograms = events.Histograms("rollout/scores")
    assert [(event.step, event.histogram_value.num) for event in histograms] == [(1, 2), (2, 2), (3, 1)]
    texts = {
        event.step: event.tensor_proto.string_val[0].decode()
        for event in events.Tensors("samples/text_summary")
    }
    assert texts.keys() == {1, 2, 3}
    assert "| Say \\| \\<b\\>it\\</b\\><br> | answer 3 again | 1.5 | 0 | 2 |" in texts[3]


def test_a_run_that_starts_anew_has_no_samples_of_an_older_one(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"step": 1}\n')
    logger(tmp_path).close()
    assert (tmp_path / "samples.jsonl").read_text() == ""


def test_hyperparameters_are_beside_the_curves(tmp_path):
    logger(tmp_path, "--reward_endpoint=http://me:secret@host/score", step="rlhf").close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"host/score" in content
    assert b"secret" not in content
    assert b"learning_rate" in content
    assert b"model_name_or_path" in content
