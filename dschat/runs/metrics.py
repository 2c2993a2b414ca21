"""Where numbers go: the console, `metrics.jsonl` and TensorBoard on rank 0, nowhere on other ranks."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dschat.arguments import RunArguments
from dschat.console import messages
from dschat.runs.output_folder import METRICS, tensorboard_folder, without_infinities
from dschat.runs.registry import metric


def _quiet_about_storage(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread dies of a full disk with a traceback; `MetricsLogger.log` says it in a line."""
    if not (isinstance(args.exc_value, OSError) and isinstance(args.thread, _AsyncWriterThread)):
        threading.__excepthook__(args)


class MetricsLogger:
    """One JSON object a line in `metrics.jsonl`, the same numbers in TensorBoard, and a progress bar.

    On ranks other than 0 every method does nothing, so that callers need not know their rank.
    """

    def __init__(
        self,
        run: RunArguments,
        step: str,
        *,
        total_steps: int,
        description: str,
        is_main_process: bool,
        steps_done: int | None = None,
    ) -> None:
        """`step` is the training step's name in the registry of metrics.

        With `steps_done`, 0 among them, the lines and curves of a resumed run go on after that step.
        """
        self._step = step
        self._lines: FileIO | None = None
        self._unwritten = b""
        self._writer: SummaryWriter | None = None
        self._bar = tqdm(
            total=total_steps,
            initial=steps_done or 0,
            desc=description,
            disable=not is_main_process,
            dynamic_ncols=True,
        )
        if not is_main_process:
            return
        if run.output_dir:
            self._lines = FileIO(Path(run.output_dir) / METRICS, "w" if steps_done is None else "a")
        folder = tensorboard_folder(run)
        if folder:
            purge_step = None if steps_done is None else steps_done + 1
            threading.excepthook = _quiet_about_storage
            self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def log(self, step: int, *, show: tuple[str, ...] = (), **values: float) -> None:
        """Record the values of a step; those named in `show` stand beside the progress bar.

        JSON has no infinities: a value that is not finite is written as null. What finds no room on the disk
        is kept and tried again; TensorBoard is given up then. Raises `KeyError` for what the registry of
        metrics lacks.
        """
        tags = {name: metric(name, self._step).tag for name in values}
        if self._lines:
            self._write(json.dumps({"step": step, **without_infinities(values)}) + "\n")
        with self._gives_up_curves():
            if self._writer:
                for name, value in values.items():
                    self._writer.add_scalar(tags[name], value, step)
        if show:
            self._bar.set_postfix(
                {name: f"{values[name]:.4g}" for name in show if name in values}, refresh=False
            )

    @contextmanager
    def _gives_up_curves(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            messages.warning(f"no more curves for TensorBoard: {error}.")
            self._writer = None

    def flush(self) -> None:
        """Try again to write the lines that found no room."""
        self._write("")

    def _write(self, lines: str) -> None:
        if self._lines is None:
            return
        had_room = not self._unwritten
        self._unwritten += lines.encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._lines.write(self._unwritten) :]
        except OSError as error:
            if had_room:
                messages.warning(f"{METRICS} cannot be written: {error}; its lines are kept until it can.")

    def advance(self) -> None:
        """One optimiser step (step 3: one PPO step) is done."""
        self._bar.update()

    def close(self) -> None:
        """Finish the bar and the files."""
        self.flush()
        if self._lines:
            self._lines.close()
        with self._gives_up_curves():
            if self._writer:
                self._writer.close()
        self._bar.close()
