"""Resuming a run: the checkpoint to resume from is chosen, verified, and compared with the run."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dschat.arguments import STARTING, RunDescription, Setting
from dschat.checkpoints.checkpoint import Checkpoints, identity, read_progress
from dschat.console import messages
from dschat.distributed.collectives import all_gather_object, barrier
from dschat.distributed.mesh import is_main_process
from dschat.errors import UserError
from dschat.export.shared_prompts import overlap_warnings
from dschat.export.upstream import UpstreamModel
from dschat.runs.atomic_folder import damage, flush
from dschat.runs.output_folder import (
    METRICS,
    STEP_FOLDERS,
    checkpoints_folder,
    finished_checkpoints,
    resumes,
    start_run,
)

UNREMARKABLE = (*STARTING, "output_dir")
"""Flags whose changes are not reported."""


def begin_run(description: RunDescription, *, data: str, models: Sequence[UpstreamModel] = ()) -> Checkpoints:
    """Choose and verify the checkpoint to resume from, if any, and prepare the output folder for the run.

    Every rank calls it once the process group exists, before models are loaded. `data` is the fingerprint of
    the training data, and `models` are those that the run starts from. Raises the same `UserError` on every
    rank where a checkpoint cannot be used.
    """
    for warning in overlap_warnings(description, models):
        messages.info(warning)
    choice: dict[str, Any] = {}
    now = identity(description, data)
    if is_main_process():
        try:
            if description.run.output_dir:
                now["models"] = {model.flag: model.fingerprint() for model in models}
            choice = _choose(description, now)
        except UserError as error:
            choice = {"error": str(error)}
    choice = all_gather_object(choice, axis="world")[0]
    if "error" in choice:
        raise UserError(choice["error"])
    chosen = Path(choice["chosen"]) if choice["chosen"] else None
    output_dir = description.run.output_dir
    if is_main_process():
        start_run(description, is_resumed=chosen is not None)
        if chosen is not None and output_dir is not None and (chosen / METRICS).is_file():
            _restore_metrics(chosen / METRICS, Path(output_dir) / METRICS)
    barrier(axis="world")
    return Checkpoints(description.run, now, chosen, choice["damaged"])


def _choose(description: RunDescription, now: dict[str, Any]) -> dict[str, Any]:
    """The path of the checkpoint to resume from ("chosen"), and the names of damaged ones ("damaged")."""
    asked, root = resumes(description.run), checkpoints_folder(description.run)
    if asked is None or root is None:
        return {"chosen": None, "damaged": []}
    if asked != "latest":
        folder = Path(asked)
        problem = damage(folder) if folder.is_dir() else "there is no such folder"
        if problem:
            raise UserError(
                f"--resume_from_checkpoint {folder} cannot be used: {problem}; name an intact checkpoint "
                "(output_dir/checkpoints/step_...), or latest for the newest of them."
            )
        _compare(folder, description, now)
        return {"chosen": str(folder), "damaged": []}
    finished = finished_checkpoints(root)
    damaged: list[str] = []
    for unfinished in sorted(path.name for path in root.glob(STEP_FOLDERS) if path.name not in finished):
        messages.warning(f"checkpoint {root / unfinished} is passed over: {damage(root / unfinished)}.")
    for name in reversed(finished):
        problem = damage(root / name)
        if problem is None:
            _compare(root / name, description, now)
            messages.info(f"going on from checkpoint {root / name}")
            return {"chosen": str(root / name), "damaged": damaged}
        messages.warning(f"checkpoint {root / name} is passed over: {problem}.")
        damaged.append(name)
    if damaged:
        raise UserError(
            f"--resume_from_checkpoint latest: no checkpoint in {root} is intact; to start from the "
            "beginning, give --overwrite_output_dir in its place."
        )
    messages.info(f"--resume_from_checkpoint latest: there is none in {root}; starting from the beginning.")
    return {"chosen": None, "damaged": []}


def _compare(folder: Path, description: RunDescription, now: dict[str, Any]) -> None:
    """Raise `UserError` where the run is not the one that was saved in `folder`; report other differences."""
    saved = read_progress(folder)
    for name in ("format", "program"):
        if saved[name] != now[name]:
            raise UserError(
                f"--resume_from_checkpoint {folder}: its {name} is {saved[name]!r} and this one's is "
                f"{now[name]!r}; name a checkpoint of the same program and version."
            )
    changed = dict(_changed_settings(description, saved["settings"]))
    for name, (before, setting) in changed.items():
        if setting.at_resume == "same":
            raise UserError(
                f"--{name} is {setting.value!r} and was {before!r} when {folder} was saved: the run would "
                f"not be the same; give --{name} as it was, or start anew in another --output_dir."
            )
    for name, number in saved["sizes"].items():
        if now["sizes"][name] != number:
            raise UserError(
                f"{name} x ranks is {now['sizes'][name]} and was {number} when {folder} was saved on "
                f"{saved['world_size']} ranks; choose them so that the product is {number} again."
            )
    _compare_models(folder, saved["models"], now["models"])
    if saved["data"] != now["data"]:
        raise UserError(
            f"--data_path: what it names has changed since {folder} was saved, so the run cannot go on in "
            "the middle of it; restore the data, or start anew in another --output_dir."
        )
    _report_differences(folder, saved, now, changed)


def _compare_models(folder: Path, saved: dict[str, str], now: dict[str, str]) -> None:
    """Raise `UserError` where the run starts from other models than the saved one, by content."""
    for flag in [*now, *(flag for flag in saved if flag not in now)]:
        if saved.get(flag) == now.get(flag):
            continue
        problem = "names another model, or other weights, than"
        if flag not in now or flag not in saved:
            problem = "is missing and was given" if flag in saved else "is given and was not"
        raise UserError(
            f"{flag} {problem} when {folder} was saved: the run would not be the same; give the models that "
            "it began with, or start anew in another --output_dir."
        )


def _changed_settings(
    description: RunDescription, saved: dict[str, Any]
) -> Iterator[tuple[str, tuple[Any, Setting]]]:
    """The saved value and the setting of each flag whose value has changed, by name.

    A flag that the saved run did not know had its default.
    """
    for name, setting in description.settings.items():
        before = saved.get(name, setting.default)
        if setting.value != before:
            yield name, (before, setting)


def _report_differences(
    folder: Path, saved: dict[str, Any], now: dict[str, Any], changed: dict[str, tuple[Any, Setting]]
) -> None:
    differences = [
        f"--{name} {setting.value} (was {before})"
        for name, (before, setting) in changed.items()
        if name not in UNREMARKABLE
    ]
    differences += [
        f"{name} {number} (was {saved['versions'].get(name)})"
        for name, number in now["versions"].items()
        if number != saved["versions"].get(name)
    ]
    if saved["world_size"] != now["world_size"]:
        differences.append(f"{now['world_size']} ranks (was {saved['world_size']})")
    if differences:
        messages.note(f"other than when {folder} was saved: {', '.join(differences)}.")


def _restore_metrics(saved: Path, path: Path) -> None:
    """Replace metrics.jsonl by that of the checkpoint, in one step: later metrics are made again."""
    temporary = path.with_name(f".{path.name}.restored")
    shutil.copyfile(saved, temporary)
    flush(temporary)
    temporary.replace(path)
