"""The output folder of a step: made and tried before any work, its summary written last."""

import fcntl
import json
import math
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from dschat.arguments import RunArguments, StepArguments, write_arguments
from dschat.durable import facts_of
from dschat.errors import UserError

SUMMARY = "summary.json"
"""The final numbers of a step. It is the last file written: where it is, the step has finished."""

METRICS = "metrics.jsonl"
"""The figures of every step, one JSON object a line."""

STEP_FOLDERS = "step_" + 8 * "[0-9]"
"""What checkpoints are called; a copy that someone made of one is left alone."""

BEST = "best.json"
"""What step 3 knows of the actor in best/, while it runs."""

LOCK = ".run.lock"
"""Held by rank 0 of the run that writes into the folder."""

PATIENCE = 60.0
"""Seconds that a run waits for another's end: torchrun kills after 30."""

_claims: dict[Path, IO[bytes]] = {}

EXPORTED = ("", "actor", "best", "critic", "actor_ema")
"""Where below its output folder a step writes models."""


def tensorboard_folder(run: RunArguments) -> Path | None:
    """Where TensorBoard logs are written, if anywhere."""
    if not run.enable_tensorboard:
        return None
    if run.tensorboard_path:
        return Path(run.tensorboard_path)
    return Path(run.output_dir) / "tensorboard" if run.output_dir else None


def checkpoints_folder(run: RunArguments) -> Path | None:
    """Where a run's checkpoints are, if anywhere."""
    return Path(run.output_dir) / "checkpoints" if run.output_dir else None


def finished_checkpoints(root: Path | None) -> dict[str, int]:
    """The checkpoints in that folder that are complete, with their serial numbers, the oldest first.

    A run that went back to an earlier one makes later ones of smaller steps.
    """
    facts = {path.name: facts_of(path) for path in (root.glob(STEP_FOLDERS) if root else ())}
    found = {name: known["serial"] for name, known in facts.items() if known is not None}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def resumes(run: RunArguments) -> str | None:
    """What a run goes on from: a folder, "latest" or nothing.

    A program that torchrun starts again after a failure (--max_restarts) goes on by itself.
    """
    if run.resume_from_checkpoint or not run.output_dir:
        return run.resume_from_checkpoint
    is_restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return "latest" if is_restart and read_summary(run.output_dir) is None else None


def newest_checkpoint(run: RunArguments) -> Path | None:
    """The checkpoint that was made last, if there is one."""
    root = checkpoints_folder(run)
    return next((root / name for name in reversed(finished_checkpoints(root))), None)


def check_run_folder(run: RunArguments, *models: str) -> None:
    """Make the folders a run writes and prove them writable. Raises `UserError` that names the flag.

    New ones are private to the user. `models` are those the run starts from, which it must not overwrite: a
    run that fails would lose both. Neither is an unfinished run with checkpoints to be lost, nor may another
    run still write there.
    """
    unfinished = newest_checkpoint(run)
    if unfinished and resumes(run) is None and read_summary(run.output_dir) is None:
        raise UserError(
            f"--output_dir {run.output_dir} holds a run that has not finished and can go on from its "
            f"checkpoint {unfinished.name}: add --resume_from_checkpoint latest; or to start anew name "
            f"another folder or delete {checkpoints_folder(run)}."
        )
    for path in models if run.output_dir else ():
        written = [Path(run.output_dir, name).resolve() for name in EXPORTED]
        if Path(path).is_dir() and Path(path).resolve() in written:
            raise UserError(
                f"--output_dir {run.output_dir} would overwrite the model that the run starts from, {path}; "
                "name another folder."
            )
    folders = {"--output_dir": run.output_dir, "--tensorboard_path": run.tensorboard_path}
    for flag, folder in folders.items():
        if not folder:
            continue
        try:
            Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            if flag == "--output_dir" and int(os.environ.get("RANK", 0)) == 0:
                _claim(Path(folder))
        except OSError as error:
            raise UserError(
                f"{flag} {folder} cannot be written ({error.strerror}); name a folder you may write to."
            ) from error


def _claim(folder: Path) -> None:
    """Keep other runs out of the folder until this process ends, however it does.

    A run that is being stopped may need a moment. Raises `UserError` where it goes on.
    """
    # A record lock: unlike that of flock, it is not shared with forked processes, which may outlive this one.
    place = folder.resolve()
    if place in _claims:  # opening it once more, and closing that, would give the lock back
        return
    file = (folder / LOCK).open("ab")
    start, has_told = time.monotonic(), False
    while not _is_mine(file):
        if not has_told:
            has_told = True
            print(f"note: another run is writing into {folder}; waiting for its end.", flush=True)
        if time.monotonic() - start > PATIENCE:
            raise UserError(
                f"--output_dir {folder}: another run has been writing into it for the last {PATIENCE:.0f} "
                "seconds; stop that one first, or name another folder."
            )
        time.sleep(0.1)
    _claims[place] = file


def _is_mine(file: IO[bytes]) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def start_run(arguments: StepArguments, *, is_resumed: bool = False) -> None:
    """Clear an older run's figures and checkpoints in the same folder and keep the new arguments (rank 0).

    A resumed run goes on with them. To be called once the input is known to be good: until then the older
    run stays a finished one.
    """
    if not arguments.run.output_dir:
        return
    folder = Path(arguments.run.output_dir)
    (folder / SUMMARY).unlink(missing_ok=True)
    if not is_resumed:
        (folder / BEST).unlink(missing_ok=True)
        shutil.rmtree(checkpoints_folder(arguments.run), ignore_errors=True)
    for old_curve in () if is_resumed else (folder / "tensorboard").glob("events.out.tfevents.*"):
        old_curve.unlink()
    write_arguments(arguments, folder / "arguments.json")


def without_infinities(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures, those that are not finite as None: JSON has no infinities."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in figures.items()
    }


def write_summary(output_dir: str | None, summary: dict[str, Any]) -> None:
    """Write the final numbers of a finished step (rank 0); one that is not finite becomes null."""
    if output_dir:
        (Path(output_dir) / SUMMARY).write_text(json.dumps(without_infinities(summary), indent=2) + "\n")


def read_summary(folder: str | Path) -> dict[str, Any] | None:
    """The summary of a finished step, None where there is none."""
    path = Path(folder) / SUMMARY
    return json.loads(path.read_text()) if path.is_file() else None
