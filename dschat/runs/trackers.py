"""Where metrics go beside metrics.jsonl: TensorBoard, and the trackers of --report_to.

A run that goes on from a checkpoint makes the steps after it again, with the same numbers. TensorBoard hides
what was written of them before. The others go on under the name that the run had, and are not given what they
have. (W&B could forget it, by `resume_from`: in private preview, on its server alone, by its own count.)
"""

import importlib
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from dschat.arguments import RunArguments, RunDescription
from dschat.console.chatter import prints_in_log
from dschat.console.text import markdown_table
from dschat.runs.atomic_folder import write_json
from dschat.runs.output_folder import TRACKERS, tensorboard_folder

PROJECT = "dschat"
LAST_STEPS = "last_steps"
"""In trackers.json, beside names: the last step of each metric that the trackers had before a resume."""


class Tracker:
    """Takes a run's metrics by their tags on rank 0; what cannot show arrays or samples leaves them out."""

    name: str
    run_id = ""
    """The name under which the tracker goes on with the run."""
    last_steps: Mapping[str, int] = MappingProxyType({})
    """The last step that it has of each metric."""

    def lacks(self, step: int, name: str = "step") -> bool:
        """Whether it has no value yet of this metric at this step; by default of anything at this step."""
        return step > self.last_steps.get(name, -1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point of each curve."""
        raise NotImplementedError

    def histograms(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        """One histogram of each."""

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Samples of this step, with equal keys."""

    def close(self) -> None:
        """Write or send what is still in memory."""


class TensorBoard(Tracker):
    """Event files in a folder."""

    name = "TensorBoard"

    def __init__(self, folder: Path, settings: dict[str, Any], steps_done: int | None) -> None:
        threading.excepthook = _quiet_about_storage
        self.writer = SummaryWriter(str(folder), purge_step=None if steps_done is None else steps_done + 1)
        if steps_done is None:
            for part in hparams(settings, {}):
                self.writer._get_file_writer().add_summary(part)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def histograms(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        for tag, array in arrays.items():
            self.writer.add_histogram(tag, array, step)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        self.writer.add_text("samples", markdown_table(rows), step)

    def close(self) -> None:
        self.writer.close()


class WandB(Tracker):
    """Weights & Biases, in project WANDB_PROJECT; with WANDB_MODE=offline `wandb sync` sends it later."""

    name = "wandb"

    def __init__(self, run: RunArguments, settings: dict[str, Any], run_id: str | None) -> None:
        self._wandb = importlib.import_module("wandb")
        quiet = self._wandb.Settings(console="off", silent=True)
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self._run = self._wandb.init(
            project=project, id=run_id, resume="allow", dir=run.output_dir, config=settings, settings=quiet
        )
        self._run.define_metric("*", step_metric="step")  # W&B's own count cannot go back to a checkpoint
        self.run_id = self._run.id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def histograms(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        self.scalars(step, {tag: self._wandb.Histogram(array) for tag, array in arrays.items()})

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        table = self._wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self.scalars(step, {"samples": table})

    def close(self) -> None:
        self._run.finish()


class MLflow(Tracker):
    """MLflow's server of MLFLOW_TRACKING_URI, or files in mlruns/ of the output folder."""

    name = "mlflow"

    def __init__(self, run: RunArguments, settings: dict[str, Any], run_id: str | None) -> None:
        if "MLFLOW_TRACKING_URI" not in os.environ:  # MLflow 3 has files on request alone
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        mlflow = importlib.import_module("mlflow")
        self._metric = mlflow.entities.Metric
        folder = Path(run.output_dir or ".", "mlruns").absolute().as_uri()
        self._client = mlflow.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", folder))
        if run_id:
            self._client.update_run(run_id, "RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            known = self._client.get_experiment_by_name(name)
            experiment = known.experiment_id if known else self._client.create_experiment(name)
            run_id = self._client.create_run(experiment).info.run_id
            params = [mlflow.entities.Param(key, str(value)[:500]) for key, value in settings.items()]
            for first in range(0, len(params), 100):  # as many as a request may have
                self._client.log_batch(run_id, params=params[first : first + 100])
        self.run_id = run_id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        names = {tag: re.sub(r"[^/\w.\- :]", "_", tag) for tag in values}  # MLflow refuses other signs
        metrics = [self._metric(names[tag], float(value), now, step) for tag, value in values.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self.run_id)


class Trackio(Tracker):
    """trackio: a database below TRACKIO_DIR, by default of the user's, that `trackio show` opens."""

    name = "trackio"

    def __init__(self, run: RunArguments, settings: dict[str, Any], run_id: str | None) -> None:
        trackio = importlib.import_module("trackio")
        self.run_id = run_id or f"{Path(run.output_dir or 'run').name}-{uuid.uuid4().hex[:6]}"
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        with prints_in_log():
            self._run = trackio.init(
                project=project, name=self.run_id, resume="allow", config=settings, embed=False
            )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        with prints_in_log():
            self._run.finish()


OTHERS: dict[str, Any] = {"wandb": WandB, "mlflow": MLflow, "trackio": Trackio}


def build_trackers(description: RunDescription, steps_done: int | None) -> list[Tracker]:
    """TensorBoard, and those of --report_to.

    A run that goes on after `steps_done` does so under the names that trackers.json in its folder has.
    """
    run, folder, trackers = description.run, tensorboard_folder(description.run), list[Tracker]()
    settings = {name: setting.value for name, setting in description.settings.items()}
    plain = {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for name, value in settings.items()
        if value not in (None, [])
    }
    if folder:
        trackers.append(TensorBoard(folder, plain, steps_done))
    names = Path(run.output_dir, TRACKERS) if run.output_dir else None
    known = json.loads(names.read_text()) if names and names.is_file() and steps_done is not None else {}
    for name in run.trackers:
        trackers.append(OTHERS[name](run, plain, known.get(name)))
        trackers[-1].last_steps = known.get(LAST_STEPS, {}) if name in known else {}
    if names and run.trackers:
        write_json(names, known | {tracker.name: tracker.run_id for tracker in trackers if tracker.run_id})
    return trackers


def _quiet_about_storage(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread dies of a full disk with a traceback; `MetricsLogger` says it in a line."""
    if not (isinstance(args.exc_value, OSError) and isinstance(args.thread, _AsyncWriterThread)):
        threading.__excepthook__(args)
