"""Trackers of --report_to: those that are installed really, the others by their refusal."""

import importlib.util
import json
import os

import pytest
from processes import ROOT, python
from step_flags import MODEL, assert_refused

from dschat.arguments import parse_arguments
from dschat.errors import UserError
from dschat.runs.metrics import MetricsLogger
from dschat.runs.output_folder import check_free
from dschat.runs.trackers import Tracker


def description(folder, *argv: str):
    return parse_arguments("sft", [*MODEL, f"--output_dir={folder}", *argv]).description


def logged(folder, *argv: str, steps_done: int | None = None) -> None:
    """Steps 1 and 2, or those after `steps_done`, as a run logs them."""
    logger = MetricsLogger(
        description(folder, *argv), total_steps=2, title="SFT", is_main_process=True, steps_done=steps_done
    )
    for step in range((steps_done or 0) + 1, 3):
        logger.log(step, {"loss": 1.0 / step, "grad_norm": float("nan")})
        logger.samples(step, [{"prompt": "a", "answer": "b"}])
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
    assert json.loads((tmp_path / "trackers.json").read_text()) == first
    runs = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(runs) == 2 or os.environ.get("WANDB_RUN_ID")
    assert all(name.endswith(first["wandb"]) for name in runs)


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
    assert sorted({(point.step, point.value) for point in history}) == [(1, 1.0), (2, 0.5)]


@needs["trackio"]
def test_trackio_has_every_metric_over_steps(tmp_path):
    """In a process of its own, as trackio reads its folder's name once."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys; from pathlib import Path\n"
        "sys.path.insert(0, str(Path(sys.argv[1]) / 'runs'))\n"
        "from test_trackers import logged\n"
        "logged(Path(sys.argv[2]), '--report_to', 'trackio')\n"
        "import sqlite3\n"
        "(file,) = Path(sys.argv[2], 'trackio').glob('*.db')\n"
        "rows = sqlite3.connect(file).execute('select metrics from metrics')\n"
        "print([row[0] for row in rows])\n"
    )
    env = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    said = python(program, ROOT / "tests", tmp_path, env=env, afresh=True).stdout
    assert '"train/loss":1.0' in said.replace(" ", "").replace("\\", "")
    assert '"train/loss":0.5' in said.replace(" ", "").replace("\\", "")
