"""What the folders of runs hold, as far as it can be read: half a line or a missing file is no error."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dschat.runs.output_folder import ARGUMENTS, LOG, METRICS, SUMMARY
from dschat.runs.started import STARTED

STEPS = ("sft", "reward", "dpo", "rlhf")
TITLES = {
    "sft": "Supervised fine-tuning",
    "reward": "Reward model",
    "dpo": "DPO",
    "rlhf": "PPO",
    "": "A step that did not start",
}
GROUPS = {"ppo": "rlhf", "reward": "reward", "dpo": "dpo", "sft": "sft"}
"""A group of settings that only this step has."""
TRAINING_LOG = "training.log"
"""The console of a step of e2e_rlhf.py."""
WARNING = re.compile(r"^(WARNING: |note: |guard: |.*\bwarning: )", re.IGNORECASE)
FAILURE = re.compile(r"^(error: |Traceback |\w*(Error|Exception)\b.*:)")
STOPPED = re.compile(r"stopped after step \d+ as .+ asked")


@dataclass(frozen=True)
class Run:
    """A step's folder."""

    folder: Path
    step: str
    """One of `STEPS`, or "" where it is not known."""
    arguments: dict[str, dict[str, Any]]
    summary: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    log: list[str]

    @property
    def curves(self) -> dict[str, tuple[list[float], list[float]]]:
        """Steps and values by metric; values that are not finite are left out."""
        found: dict[str, tuple[list[float], list[float]]] = {}
        for line in self.metrics:
            for name, value in line.items():
                if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                    steps, values = found.setdefault(name, ([], []))
                    steps.append(line["step"])
                    values.append(float(value))
        return found

    @property
    def last_step(self) -> int:
        """The last step with a line of metrics."""
        return max((line["step"] for line in self.metrics), default=0)

    @property
    def warnings(self) -> list[str]:
        """Warnings and notes of the log, each once with how often it came."""
        counts = Counter(line for line in self.log if WARNING.match(line))
        return [line if number == 1 else f"{line} ({number} times)" for line, number in counts.items()]

    @property
    def failure(self) -> str | None:
        """The line with which an unfinished run ended, where it says that it failed or was stopped."""
        lines = [line for line in self.log if FAILURE.match(line) or STOPPED.search(line)]
        return lines[-1] if lines else None

    def json(self, name: str) -> Any:
        """A file of the folder; None where it is not there or damaged."""
        return read_json(self.folder / name)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The lines of a file of JSON lines that can be read."""
        return read_lines(self.folder / name)


def find_runs(output_dir: Path) -> list[Run]:
    """The runs in a folder and in the folders in it, in the order of the pipeline."""
    places = [output_dir, *sorted(path for path in output_dir.glob("*") if path.is_dir())]
    runs = [read_run(path) for path in places if has_run(path)]
    return sorted(runs, key=lambda run: (STEPS.index(run.step) if run.step else len(STEPS), str(run.folder)))


def has_run(folder: Path) -> bool:
    """Whether a run began in the folder."""
    return any((folder / name).is_file() for name in (ARGUMENTS, TRAINING_LOG, METRICS))


def read_run(folder: Path) -> Run:
    """What there is of a run."""
    found = read_json(folder / ARGUMENTS)
    arguments = found if isinstance(found, dict) else {}
    summary = read_json(folder / SUMMARY)
    metrics = [line for line in read_lines(folder / METRICS) if isinstance(line.get("step"), int)]
    log = read_log(folder / LOG) or read_log(folder / TRAINING_LOG)
    summary = summary if isinstance(summary, dict) else None
    return Run(folder, step_of(folder, arguments), arguments, summary, metrics, log)


def step_of(folder: Path, arguments: dict[str, Any]) -> str:
    """Which step wrote the folder, by its arguments, or by the name that e2e_rlhf.py gives it."""
    for group, step in GROUPS.items():
        if group in arguments:
            return step
    names = {"step1_sft": "sft", "step2_reward": "reward", "step3_ppo": "rlhf"}
    return names.get(folder.name, "")


def read_json(path: Path) -> Any:
    """A JSON file; None where there is none, or half of one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a line that a killed run left half written is left out."""
    found = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def read_log(path: Path) -> list[str]:
    """The lines of a log as they ended: of a progress bar what it was last."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line.rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]


def started(run: Run) -> dict[str, Any]:
    """How the run was started, as far as it noted that."""
    found = run.json(STARTED)
    return found if isinstance(found, dict) else {}
