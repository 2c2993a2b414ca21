"""The output folder of a run: checked before any work, cleared at the start, its summary written last."""

import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from socket import gethostname
from typing import Any

from dschat.arguments import RunArguments, RunDescription
from dschat.console import messages
from dschat.console.streams import log_of_streams
from dschat.errors import UserError
from dschat.runs.atomic_folder import facts_of, write_json
from dschat.runs.export_files import foreign_files, remove_export
from dschat.runs.lock import LOCK, claim, has_begun_before, note_begun
from dschat.runs.started import STARTED, how_started

SUMMARY = "summary.json"
"""The final metrics of a step. It is written last: a folder with this file holds a finished run."""

ARGUMENTS = "arguments.json"
"""The arguments of a run. A folder with this file is the output folder of a run."""

METRICS = "metrics.jsonl"
"""The metrics of every step, one JSON object per line."""

SAMPLES = "samples.jsonl"
"""Prompts and answers now and then, one JSON object per line."""

TRACKERS = "trackers.json"
"""The names under which the trackers of --report_to know the run."""

FORECAST = "forecast.json"
"""Whether the reward model is worth PPO; its page is beside it."""

PROFILE = "profile"
"""The subfolder of --profile."""

STEP_FOLDERS = "step_" + 8 * "[0-9]"
"""Pattern of the names of checkpoints. Folders with other names, such as copies, are left alone."""

BEST = "best.json"
"""The state of `export.best_model.BestModel`, while a run goes on."""

LOG = "log.txt"
"""The output of rank 0."""

EXPORTS = ("", "actor", "best", "critic", "actor_ema")
"""Subfolders to which steps export models; "" is the output folder itself, which step 3 does not use."""

TEMPORARY_CHECKPOINTS = tuple(f".{state}-step_*" for state in ("saving", "replaced", "resharded"))
"""Patterns of folders that a killed run may leave beside its checkpoints."""

CHECKPOINT_FILES = ("progress.json", "rank_00000.json", "rank_00000.safetensors")
"""Files by which a checkpoint is recognised that was never marked complete."""


def tensorboard_folder(run: RunArguments) -> Path | None:
    """The folder of TensorBoard logs; None where none are written."""
    if not run.enable_tensorboard:
        return None
    if run.tensorboard_path:
        return Path(run.tensorboard_path)
    return Path(run.output_dir) / "tensorboard" if run.output_dir else None


def checkpoints_folder(run: RunArguments) -> Path | None:
    """The folder of a run's checkpoints; None without an output folder."""
    return Path(run.output_dir) / "checkpoints" if run.output_dir else None


def finished_checkpoints(root: Path | None) -> dict[str, int]:
    """Serial numbers of the complete checkpoints in folder `root`, by name, the oldest first.

    Serial numbers count checkpoints as they are made. A run that went back to an earlier checkpoint makes
    later ones of smaller steps.
    """
    facts = {path.name: facts_of(path) for path in (root.glob(STEP_FOLDERS) if root else ())}
    found = {name: known["serial"] for name, known in facts.items() if known is not None}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def resumes(run: RunArguments) -> str | None:
    """The checkpoint that a run resumes from: a folder, "latest", or None.

    A program that torchrun starts again after a failure (--max_restarts) resumes from the latest by itself.
    """
    if run.resume_from_checkpoint or not run.output_dir:
        return run.resume_from_checkpoint
    return "latest" if has_begun_before(Path(run.output_dir)) else None


def newest_checkpoint(run: RunArguments) -> Path | None:
    """The checkpoint that was made last; None where there is none."""
    root = checkpoints_folder(run)
    if root is None:
        return None
    return next((root / name for name in reversed(finished_checkpoints(root))), None)


def check_free(run: RunArguments) -> None:
    """Raise `UserError` where a finished run would be overwritten, a live one writes, a tracker lacks.

    These are the checks that need neither torch nor models and data; `check_run_folder` makes the others. A
    finished run that is resumed ends the program.
    """
    check_finished(run)
    _check_trackers(run)
    if run.output_dir and Path(run.output_dir, LOCK).exists() and int(os.environ.get("RANK", 0)) == 0:
        with suppress(OSError):  # of which `check_run_folder` says more
            claim(Path(run.output_dir))


def _check_trackers(run: RunArguments) -> None:
    """Raise `UserError` for a package of --report_to that is missing, by the extra that brings it."""
    for name in run.trackers:
        if find_spec(name) is None:
            raise UserError(
                f"--report_to {name}: the package {name} is not installed; pip install 'dschat[{name}]' "
                "brings it."
            )


def check_finished(run: RunArguments) -> None:
    """Raise `UserError` where a finished run would be overwritten; one that is resumed ends the program.

    Every rank may call it: nothing is changed.
    """
    root = checkpoints_folder(run)
    if not run.output_dir or root is None:
        return
    if not _is_of_a_run(Path(run.output_dir)) or read_summary(run.output_dir) is None:
        return
    finished = datetime.fromtimestamp(Path(run.output_dir, SUMMARY).stat().st_mtime)
    holds = f"--output_dir {run.output_dir} holds a run that finished on {finished:%Y-%m-%d %H:%M}"
    asked = resumes(run)
    if asked == "latest" or (asked and Path(asked).resolve().parent == root.resolve()):
        messages.info(f"{holds}: there is nothing to go on with, and nothing is changed.")
        sys.exit(0)
    if not run.overwrite_output_dir:
        raise UserError(f"{holds}; name another folder, or give --overwrite_output_dir.")


def check_run_folder(description: RunDescription, *models: str) -> None:
    """Make the folders that a run writes to, private to the user, and check that they can be written.

    Raises `UserError` that names the flag where they cannot; where another run still writes; and where the
    run would overwrite one of the `models` that it starts from, an older run or files that no run wrote.
    """
    run = description.run
    written = [Path(run.output_dir, name).resolve() for name in EXPORTS] if run.output_dir else []
    for path in models:
        if Path(path).is_dir() and Path(path).resolve() in written:
            raise UserError(
                f"--output_dir {run.output_dir} would overwrite the model that the run starts from, {path}; "
                "name another folder."
            )
    is_main_process = int(os.environ.get("RANK", 0)) == 0
    folders = {"--output_dir": run.output_dir, "--tensorboard_path": run.tensorboard_path}
    for flag, folder in folders.items():
        if not folder:
            continue
        try:
            Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            if flag == "--output_dir" and is_main_process:
                claim(Path(folder))
        except OSError as error:
            raise UserError(
                f"{flag} {folder} cannot be written ({error.strerror}); name a folder you may write to."
            ) from error
    if run.output_dir and is_main_process:
        check_finished(run)
        _check_content(description, Path(run.output_dir))
        log = log_of_streams()
        if log is not None:
            log.open(Path(run.output_dir) / LOG)


def claim_other_disk(description: RunDescription) -> str | None:
    """What `check_run_folder` does on rank 0, for the output folder on the own disk of another host.

    Returns why the folder is not free, and None where it is.
    """
    folder = Path(description.run.output_dir or "")
    try:
        claim(folder)
        _check_content(description, folder)
    except UserError as error:
        return f"on {gethostname()}: {error}"
    return None


def _check_content(description: RunDescription, folder: Path) -> None:
    """Raise `UserError` where the run would overwrite another run in `folder`, or files that no run wrote."""
    run = description.run
    unfinished = newest_checkpoint(run)
    if unfinished and resumes(run) is None and not run.overwrite_output_dir:
        raise UserError(
            f"--output_dir {run.output_dir} holds a run that has not finished and can go on from its "
            f"checkpoint {unfinished.name}: add --resume_from_checkpoint latest; or to start anew name "
            "another folder, or give --overwrite_output_dir."
        )
    foreign = list(_foreign(description, folder))
    if foreign:
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        raise UserError(
            f"--output_dir {run.output_dir} holds what the run would overwrite or remove, and that is not as "
            f"a run wrote it: {', '.join(foreign[:5])}{more}; move that away, or name another folder."
        )


def _foreign(description: RunDescription, folder: Path) -> Iterator[str]:
    """The files in `folder` that no run wrote and that the run would replace or remove, with the reason."""
    if not _is_of_a_run(folder):
        for name in (ARGUMENTS, METRICS, SAMPLES, TRACKERS, SUMMARY, BEST):
            if os.path.lexists(folder / name):
                yield f"{name} (no run wrote it)"
    checkpoints = folder / "checkpoints"
    for path in sorted(checkpoints.glob(STEP_FOLDERS)):
        if not _is_checkpoint(path):
            yield f"checkpoints/{path.name} (no checkpoint of a run)"
        elif checkpoints.is_symlink() and resumes(description.run) is None:
            yield "checkpoints (a symbolic link to a folder with checkpoints)"
            break
    if resumes(description.run) is not None and newest_checkpoint(description.run):
        return
    for name in EXPORTS[1:] if description.step == "rlhf" else ("", "best"):
        found = [str(Path(name, file)) for file in foreign_files(folder / name)]
        if found and name and (folder / name).is_symlink():
            found = [f"{name} (a symbolic link to a folder with a model)"]
        yield from found


def _is_of_a_run(folder: Path) -> bool:
    """Whether a run has begun in the folder."""
    try:
        arguments = json.loads((folder / ARGUMENTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(arguments, dict) and {"run", "data"} <= arguments.keys()


def _is_checkpoint(folder: Path) -> bool:
    if folder.is_symlink():
        return False
    return facts_of(folder) is not None or all((folder / name).is_file() for name in CHECKPOINT_FILES)


def start_run(description: RunDescription, *, is_resumed: bool = False) -> None:
    """Write arguments.json, and remove the metrics, checkpoints and models of an older run in the folder.

    A resumed run keeps them. Rank 0 calls this once the input is known to be good: until then the older run
    stays a finished one. Files that no run wrote stay, and symbolic links are not followed.
    """
    if not description.run.output_dir:
        return
    folder = Path(description.run.output_dir)
    # In this order a kill leaves a finished run, or one that nothing remains to go on from.
    _clear_checkpoints(folder / "checkpoints", complete=not is_resumed)
    (folder / SUMMARY).unlink(missing_ok=True)
    if not is_resumed:
        _clear_results(folder)
        folder.mkdir(mode=0o700, exist_ok=True)  # where it held a model and nothing else
    description.write(folder / ARGUMENTS)
    write_json(folder / STARTED, how_started())
    note_begun(folder)


def _clear_checkpoints(checkpoints: Path, *, complete: bool) -> None:
    """Remove unfinished checkpoints of killed runs, and with `complete` the finished ones too."""
    if checkpoints.is_symlink():
        return
    found = [path for pattern in TEMPORARY_CHECKPOINTS for path in checkpoints.glob(pattern)]
    if complete:
        found += filter(_is_checkpoint, checkpoints.glob(STEP_FOLDERS))
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    with suppress(OSError):  # where something else is in it, or there is none
        checkpoints.rmdir()


def _clear_results(folder: Path) -> None:
    """Remove metrics and models, but not arguments.json, by which the folder of a run is recognised."""
    for name in EXPORTS:
        remove_export(folder / name)
    if _is_of_a_run(folder):
        for name in (BEST, METRICS, SAMPLES, TRACKERS, FORECAST, "forecast.html"):
            (folder / name).unlink(missing_ok=True)
        curves = folder / "tensorboard"
        for old_curve in () if curves.is_symlink() else curves.glob("events.out.tfevents.*"):
            old_curve.unlink()
        for old_profile in (folder / PROFILE).glob("trace*.json.gz"):
            old_profile.unlink()
        (folder / PROFILE / "summary.md").unlink(missing_ok=True)


def without_infinities(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics, those that are not finite as None: JSON has no infinities."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }


def write_summary(output_dir: str | None, summary: dict[str, Any]) -> None:
    """Write the final numbers of a finished step (rank 0); one that is not finite becomes null."""
    if output_dir:
        write_json(Path(output_dir) / SUMMARY, without_infinities(summary))


def read_summary(folder: str | Path) -> dict[str, Any] | None:
    """The summary of a finished step, None where there is none. Raises `UserError` where it is damaged."""
    path = Path(folder) / SUMMARY
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); move it away, or name another folder.") from error
