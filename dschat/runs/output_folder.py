"""The output folder of a step: made and tried before any work, its summary written last."""

import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from dschat.arguments import RunArguments, RunDescription
from dschat.console import messages
from dschat.console.streams import log_of_streams
from dschat.errors import UserError
from dschat.runs.atomic_folder import facts_of, write_json
from dschat.runs.export_files import foreign_files, remove_export
from dschat.runs.lock import LOCK, claim, has_begun_before, note_begun

SUMMARY = "summary.json"
"""The final numbers of a step. It is the last file written: where it is, the step has finished."""

ARGUMENTS = "arguments.json"
"""What the run was started with. A folder that has one is a run's."""

METRICS = "metrics.jsonl"
"""The figures of every step, one JSON object a line."""

STEP_FOLDERS = "step_" + 8 * "[0-9]"
"""What checkpoints are called; a copy that someone made of one is left alone."""

BEST = "best.json"
"""What step 3 knows of the actor in best/, while it runs."""

LOG = "log.txt"
"""What rank 0 printed."""

EXPORTS = ("", "actor", "best", "critic", "actor_ema")
"""Where below its output folder a step writes models; step 3 writes none into the folder itself."""

TEMPORARY_CHECKPOINTS = tuple(f".{state}-step_*" for state in ("saving", "replaced", "resharded"))
"""What a run that was killed may leave beside its checkpoints."""

CHECKPOINT_FILES = ("progress.json", "rank_00000.json", "rank_00000.safetensors")
"""Files that together tell a checkpoint of ours without a mark that is whole."""


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
    return "latest" if has_begun_before(Path(run.output_dir)) else None


def newest_checkpoint(run: RunArguments) -> Path | None:
    """The checkpoint that was made last, if there is one."""
    root = checkpoints_folder(run)
    return next((root / name for name in reversed(finished_checkpoints(root))), None)


def check_free(run: RunArguments) -> None:
    """Raise `UserError` at once where a finished run would be overwritten, or a live one writes.

    What can be said without torch, models and data; `check_run_folder` says the rest. A finished run that is
    resumed ends the program.
    """
    check_finished(run)
    if run.output_dir and Path(run.output_dir, LOCK).exists() and int(os.environ.get("RANK", 0)) == 0:
        with suppress(OSError):  # of which `check_run_folder` says more
            claim(Path(run.output_dir))


def check_finished(run: RunArguments) -> None:
    """Raise `UserError` where a finished run would be overwritten; one that is resumed ends the program.

    Every rank may call it: nothing is changed.
    """
    if not run.output_dir or not _is_of_a_run(Path(run.output_dir)) or read_summary(run.output_dir) is None:
        return
    finished = datetime.fromtimestamp(Path(run.output_dir, SUMMARY).stat().st_mtime)
    holds = f"--output_dir {run.output_dir} holds a run that finished on {finished:%Y-%m-%d %H:%M}"
    asked = resumes(run)
    if asked == "latest" or (asked and Path(asked).resolve().parent == checkpoints_folder(run).resolve()):
        messages.info(f"{holds}: there is nothing to go on with, and nothing is changed.")
        sys.exit(0)
    if not run.overwrite_output_dir:
        raise UserError(f"{holds}; name another folder, or give --overwrite_output_dir.")


def check_run_folder(description: RunDescription, *models: str) -> None:
    """Make the folders a run writes and prove them writable. Raises `UserError` that names the flag.

    New ones are private to the user. `models` are those the run starts from, which it must not overwrite: a
    run that fails would lose both. Neither is an older run to be lost, nor what no run wrote, nor may another
    run still write there.
    """
    run = description.run
    for path in models if run.output_dir else ():
        written = [Path(run.output_dir, name).resolve() for name in EXPORTS]
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
        _check_content(description)
        log = log_of_streams()
        if log is not None:
            log.open(Path(run.output_dir) / LOG)


def _check_content(description: RunDescription) -> None:
    """Raise `UserError` where the run would overwrite another, or what no run wrote."""
    run = description.run
    check_finished(run)
    unfinished = newest_checkpoint(run)
    if unfinished and resumes(run) is None and not run.overwrite_output_dir:
        raise UserError(
            f"--output_dir {run.output_dir} holds a run that has not finished and can go on from its "
            f"checkpoint {unfinished.name}: add --resume_from_checkpoint latest; or to start anew name "
            "another folder, or give --overwrite_output_dir."
        )
    foreign = list(_foreign(description))
    if foreign:
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        raise UserError(
            f"--output_dir {run.output_dir} holds what the run would overwrite or remove, and that is not as "
            f"a run wrote it: {', '.join(foreign[:5])}{more}; move that away, or name another folder."
        )


def _foreign(description: RunDescription) -> Iterator[str]:
    """What stands where the run will write, or where it removes an older run's, and is not of a run."""
    folder = Path(description.run.output_dir)
    if not _is_of_a_run(folder):
        for name in (ARGUMENTS, METRICS, SUMMARY, BEST):
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
    """Clear an older run's figures, checkpoints and models in the same folder and keep the new arguments.

    A resumed run goes on with them. Rank 0 calls it once the input is known to be good: until then the older
    run stays a finished one. What no run wrote stays, and symbolic links are not followed.
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
    note_begun(folder)


def _clear_checkpoints(checkpoints: Path, *, complete: bool) -> None:
    """Remove what killed runs had not finished, and with `complete` the checkpoints, too."""
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
    """Remove figures and models, but not the arguments, by which a folder is known to be a run's."""
    for name in EXPORTS:
        remove_export(folder / name)
    if _is_of_a_run(folder):
        for name in (BEST, METRICS):
            (folder / name).unlink(missing_ok=True)
        curves = folder / "tensorboard"
        for old_curve in () if curves.is_symlink() else curves.glob("events.out.tfevents.*"):
            old_curve.unlink()


def without_infinities(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures, those that are not finite as None: JSON has no infinities."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in figures.items()
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
