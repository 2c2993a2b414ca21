"""Trackers of --report_to: those that are installed really, the others by their refusal."""

import importlib
import importlib.util
import json
from typing import ClassVar

import pytest
from processes import ROOT, python
from step_flags import MODEL, assert_refused
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dschat.arguments import parse_arguments
from dschat.errors import UserError
from dschat.runs import trackers
from dschat.runs.metrics import MetricsLogger, restore_metrics
from dschat.runs.output_folder import check_free
from dschat.runs.trackers import Tracker


def description(folder, *argv: str):
    return parse_arguments("sft", [*MODEL, f"--output_dir={folder}", *argv]).description


def logged(folder, *argv: str, steps_done: int | None = None) -> None:
    """Steps 1 and 2, or those after `steps_done` until 3, as a run logs them and one that is resumed."""
    if steps_done:
        (folder / "saved").write_text((folder / "metrics.jsonl").read_text().partition("\n")[0] + "\n")
        restore_metrics(folder / "saved", folder)
    logger = MetricsLogger(
        description(folder, *argv), total_steps=2, title="SFT", is_main_process=True, steps_done=steps_done
    )
    for step in range((steps_done or 0) + 1, 4 if steps_done else 3):
        logger.log(step, {"loss": 1.0 / step, "grad_norm": float("nan")})
        logger.samples(step, [{"prompt": "a", "answer": "b"}])
    logger.log(1, {"eval/rivers/acc,none": 0.5})
    logger.close()


def test_names_are_checked_with_the_other_flags():
    assert_refused(["--report_to", "wandb", "comet"], ["--report_to comet", "wandb, mlflow, trackio"])
    parts = ["--report_to tensorboard and --no_enable_tensorboard"]
    assert_refused(["--report_to", "tensorboard", "--no_enable_tensorboard"], parts)
    run = parse_arguments("sft", [*MODEL, "--report_to", "trackio", "tensorboard", "wandb", "wandb"]).run
    assert run.trackers == ("wandb", "trackio")


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_package_that_is_missing_is_named_with_its_extra_before_torch_is_imported(
    name, monkeypatch, tmp_path
):
    monkeypatch.setattr("dschat.runs.output_folder.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"--report_to {name}: .* pip install 'dschat\[{name}\]'"):
        check_free(description(tmp_path, "--report_to", name).run)
    assert f'{name} = ["' in (ROOT / "pyproject.toml").read_text()


def test_a_tracker_that_fails_is_given_up_and_the_run_goes_on(tmp_path, capsys):
    class Broken(Tracker):
        name = "broken"

        def scalars(self, step, values):
            raise ConnectionError("no route")

    logger = MetricsLogger(description(tmp_path), total_steps=2, title="SFT", is_main_process=True)
    logger._trackers.append(Broken())
    for step in (1, 2):
        logger.log(step, {"loss": 1.0})
    logger.close()
    told = capsys.readouterr().out
    assert told.count("WARNING: broken gets no more metrics: ConnectionError: no route.") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


class Recording(Tracker):
    """Keeps what it is given."""

    name = "mlflow"
    given: ClassVar[list[tuple]] = []

    def __init__(self, run, settings, run_id):
        self.run_id = run_id or "the run"
        self.given.append(self.run_id if run_id is None else f"again {run_id}")

    def scalars(self, step, values):
        self.given.append((step, *values))

    def samples(self, step, rows):
        self.given.append((step, "samples"))


def test_a_resumed_run_gives_a_tracker_only_what_it_lacks_of_each_metric(tmp_path, monkeypatch):
    """Killed before the evaluation of step 3, and once more after step 2, with a checkpoint of step 1."""
    monkeypatch.setitem(trackers.OTHERS, "mlflow", Recording)
    monkeypatch.setattr(Recording, "given", given := [])
    saved = tmp_path / "saved.jsonl"

    def run(steps, evaluated, steps_done=None):
        given.clear()
        logger = MetricsLogger(
            description(tmp_path, "--report_to", "mlflow"),
            total_steps=9,
            title="SFT",
            is_main_process=True,
            steps_done=steps_done,
        )
        for step in steps:
            logger.log(step, {"loss": 1.0 / step})
            if step in evaluated:
                logger.log(step, {"eval_loss": 1.0, "eval_perplexity": 2.0})
            logger.samples(step, [{"prompt": "a"}])
            if step == 1:
                saved.write_bytes((tmp_path / "metrics.jsonl").read_bytes())
        logger.log(2, {"eval/by task/acc": 0.5})
        logger.log(2, {})
        logger.close()
        return list(given)

    def metrics(names):
        lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        return [line["step"] for line in lines if names & line.keys()]

    whole = [
        "the run",
        (1, "train/loss"),
        (1, "samples"),
        (2, "train/loss"),
        (2, "eval/loss", "eval/perplexity"),
    ]
    whole += [(2, "samples"), (3, "train/loss"), (3, "samples"), (2, "eval_command/by task/acc")]
    assert run([1, 2, 3], [2]) == whole
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed in a line
    for steps, expected in (
        ([2], []),
        ([2, 3, 4], [(3, "eval/loss", "eval/perplexity"), (4, "train/loss"), (4, "samples")]),
    ):
        restore_metrics(saved, tmp_path)
        assert (metrics({"loss"}), set(metrics({"eval/by task/acc"}))) == ([1], {2})
        assert run(steps, [3], steps_done=1) == ["again the run", *expected]
    assert metrics({"loss"}) == [1, 2, 3, 4]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    # A tracker that is new is given all that the run makes.
    names = json.loads((tmp_path / "trackers.json").read_text())
    (tmp_path / "trackers.json").write_text(json.dumps({"last_steps": names["last_steps"]}))
    restore_metrics(saved, tmp_path)
    assert run([2], [], steps_done=1)[:2] == ["the run", (2, "train/loss")]


needs = {
    name: pytest.mark.skipif(not importlib.util.find_spec(name), reason=f"pip install 'dschat[{name}]'")
    for name in ("wandb", "mlflow", "trackio")
}


@needs["wandb"]
def test_wandb_keeps_a_run_and_its_resumption_offline_under_one_name(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    logged(tmp_path, "--report_to", "wandb")
    first = json.loads((tmp_path / "trackers.json").read_text())
    logged(tmp_path, "--report_to", "wandb", steps_done=1)
    assert json.loads((tmp_path / "trackers.json").read_text())["wandb"] == first["wandb"]
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{first['wandb']}/*.wandb"))
    assert [wandb_steps(file) for file in files] == [[1, 2], [3]]


def wandb_steps(file) -> list[int]:
    """The steps at which a file of W&B, of LevelDB's records in one block, has a loss."""
    record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    data, steps = file.read_bytes()[7:], []
    assert len(data) < 2**15 - 7, "several blocks"
    while data:
        size = 7 + int.from_bytes(data[4:6], "little")
        items = record.FromString(data[7:size]).history.item
        found = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
        steps += [found["step"]] if "train/loss" in found else []
        data = data[size:]
    return steps


@needs["mlflow"]
def test_mlflow_has_every_metric_over_steps_and_the_flags(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    logged(tmp_path, "--report_to", "mlflow", "--learning_rate=0.5")
    logged(tmp_path, "--report_to", "mlflow", steps_done=1)
    from mlflow import MlflowClient

    client = MlflowClient((tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("dschat").experiment_id])
    assert run.info.run_id == json.loads((tmp_path / "trackers.json").read_text())["mlflow"]
    assert run.info.status == "FINISHED"
    assert run.data.params["learning_rate"] == "0.5"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, round(point.value, 3)) for point in history] == [(1, 1.0), (2, 0.5), (3, 0.333)]
    assert client.get_metric_history(run.info.run_id, "eval_command/rivers/acc_none")[0].step == 1


@needs["trackio"]
def test_trackio_has_every_metric_over_steps(tmp_path):
    """In a process of its own, as trackio reads its folder's name once."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys; from pathlib import Path\n"
        "sys.path.insert(0, str(Path(sys.argv[1]) / 'runs'))\n"
        "from test_trackers import logged\n"
        "logged(Path(sys.argv[2]), '--report_to', 'trackio')\n"
        "logged(Path(sys.argv[2]), '--report_to', 'trackio', steps_done=1)\n"
        "import sqlite3\n"
        "(file,) = Path(sys.argv[2], 'trackio').glob('*.db')\n"
        "rows = sqlite3.connect(file).execute('select metrics, step from metrics')\n"
        "print(sorted(step for text, step in rows if 'train/loss' in str(text)))\n"
    )
    env = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    said = python(program, ROOT / "tests", tmp_path, env=env, afresh=True).stdout
    assert "[1, 2, 3]" in said
