"""Where numbers go on rank 0: the console, `metrics.jsonl`, `samples.jsonl`, trackers. Nowhere on others."""

import json
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from dschat.arguments import RunDescription
from dschat.console import messages
from dschat.console.progress import Progress
from dschat.runs.atomic_folder import flush, write_json
from dschat.runs.output_folder import METRICS, SAMPLES, TRACKERS, without_infinities
from dschat.runs.registry import MEASURED, metric
from dschat.runs.trackers import LAST_STEPS, Tracker, build_trackers


class MetricsLogger:
    """One JSON object a line in `metrics.jsonl`, the same numbers in trackers, and a progress bar.

    On ranks other than 0 every method does nothing, so that callers need not know their rank.
    """

    def __init__(
        self,
        description: RunDescription,
        *,
        total_steps: int,
        title: str,
        is_main_process: bool,
        steps_done: int | None = None,
    ) -> None:
        """With `steps_done`, 0 among them, the lines and curves of a resumed run go on after that step."""
        self._step = description.step
        self._lines: LinesOnDisk | None = None
        self._samples: LinesOnDisk | None = None
        self._trackers: list[Tracker] = []
        self._bar = Progress(
            total=total_steps, initial=steps_done or 0, desc=title, disable=not is_main_process
        )
        if not is_main_process:
            return
        if description.run.output_dir:
            folder, mode = Path(description.run.output_dir), "w" if steps_done is None else "a"
            self._lines = LinesOnDisk(folder / METRICS, mode)
            _keep_samples(folder / SAMPLES, steps_done)
            self._samples = LinesOnDisk(folder / SAMPLES, "a")
        self._trackers = build_trackers(description, steps_done)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the metrics of a step; the main ones stand beside the progress bar.

        JSON has no infinities: a value that is not finite is written as null. What finds no room on the disk
        is kept and tried again; a tracker that fails is given up. A tracker is not given again what it had
        before a run was resumed. Raises `KeyError` for what the registry of metrics lacks.
        """
        entries = {name: metric(name, self._step) for name in values}
        if not values:
            return
        if self._lines:
            self._lines.add({"step": step, **without_infinities(dict(values))})

        def give(tracker: Tracker) -> None:
            new = {entries[name].tag: value for name, value in values.items() if tracker.lacks(step, name)}
            if new:
                tracker.scalars(step, new)

        self._track(give)
        shown = [name for name, entry in entries.items() if entry.is_main and entry.group != "eval"]
        if shown:
            postfix = ", ".join(f"{name.replace('_', ' ')} {values[name]:.4g}" for name in shown)
            self._bar.set_postfix_str(postfix, refresh=False)

    def histograms(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Show how the numbers of a step are distributed, in the trackers that can."""
        finite = {tag: array[np.isfinite(array)] for tag, array in arrays.items()}
        filled = {tag: array for tag, array in finite.items() if array.size}
        self._track(lambda tracker: tracker.histograms(step, filled) if tracker.lacks(step) else None)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Add samples of a step to `samples.jsonl`, and show them in the trackers that can."""
        if self._samples:
            for row in rows:
                self._samples.add({"step": step, **without_infinities(row)})
        self._track(lambda tracker: tracker.samples(step, rows) if tracker.lacks(step) else None)

    def _track(self, give: Callable[[Tracker], None]) -> None:
        """Give each tracker something; one that fails gets no more, and the run goes on."""
        for tracker in list(self._trackers):
            try:
                give(tracker)
            except Exception as error:  # a network, a server, a disk: whatever its library raises
                messages.warning(f"{tracker.name} gets no more metrics: {type(error).__name__}: {error}.")
                self._trackers.remove(tracker)

    def flush(self) -> None:
        """Try again to write the lines that found no room."""
        for lines in (self._lines, self._samples):
            if lines:
                lines.flush()

    def advance(self) -> None:
        """One optimiser step (step 3: one PPO step) is done."""
        self._bar.update()

    def close(self) -> None:
        """Finish the bar and the files."""
        self.flush()
        for lines in (self._lines, self._samples):
            if lines:
                lines.file.close()
        self._track(lambda tracker: tracker.close())
        self._bar.close()


class LinesOnDisk:
    """A file of JSON objects, one a line; those that find no room are kept until there is some."""

    def __init__(self, path: Path, mode: str) -> None:
        """With "w" the file is emptied first."""
        if mode == "w":
            path.write_bytes(b"")
        self.file, self._name, self._unwritten = FileIO(path, "a"), path.name, b""

    def add(self, value: dict[str, Any]) -> None:
        """Write a line."""
        self._write(json.dumps(value) + "\n")

    def flush(self) -> None:
        """Try again to write what found no room."""
        self._write("")

    def _write(self, lines: str) -> None:
        had_room = not self._unwritten
        self._unwritten += lines.encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self.file.write(self._unwritten) :]
        except OSError as error:
            if had_room:
                messages.warning(f"{self._name} cannot be written: {error}; its lines are kept until it can.")


def restore_metrics(saved: Path, folder: Path) -> None:
    """Replace metrics.jsonl by that of a checkpoint, in one step: later metrics are made again.

    What --eval_command measured later stays, as the models do. trackers.json gets the last step of each
    metric that trackers have.
    """
    path, kept = folder / METRICS, saved.read_bytes()
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    later = {line: json.loads(line) for line in lines if line.endswith(b"\n")}
    for line in kept.splitlines(keepends=True):
        later.pop(line, None)
    if (folder / TRACKERS).is_file():
        names = json.loads((folder / TRACKERS).read_text(encoding="utf-8"))
        last = names.setdefault(LAST_STEPS, {})
        for row in later.values():
            last.update({name: max(row["step"], last.get(name, 0)) for name in row})
        write_json(folder / TRACKERS, names)
    measured = [line for line, row in later.items() if any(name.startswith(MEASURED) for name in row)]
    temporary = path.with_name(f".{path.name}.restored")
    temporary.write_bytes(kept + b"".join(measured))
    flush(temporary)
    temporary.replace(path)


def _keep_samples(path: Path, steps_done: int | None) -> None:
    """Leave the samples of the steps that a resumed run has done; the later ones it makes again."""
    if not path.is_file():
        return
    lines = path.read_bytes().splitlines(keepends=True) if steps_done is not None else []
    kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= (steps_done or 0)]
    temporary = path.with_name(f".{path.name}.kept")
    temporary.write_bytes(b"".join(kept))
    temporary.replace(path)
