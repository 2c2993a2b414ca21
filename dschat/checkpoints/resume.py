"""Resuming a run: the checkpoint to resume from is chosen, verified, and compared with the run."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from socket import gethostname
from typing import Any

from dschat.arguments import STARTING, RunArguments, RunDescription, Setting
from dschat.checkpoints.checkpoint import PROGRESS, Checkpoints, identity, read_progress
from dschat.checkpoints.spread import Holdings, complete_disks, damage_of_all, gather_holdings, holdings
from dschat.console import messages
from dschat.distributed import restart
from dschat.distributed.collectives import all_gather_object, barrier, first_error_across_ranks
from dschat.distributed.mesh import is_main_process, mesh
from dschat.distributed.storage import Storage, fetch, first_ranks, storage_of
from dschat.errors import STORAGE_REMEDY, UserError
from dschat.export.shared_prompts import overlap_warnings
from dschat.export.upstream import UpstreamModel
from dschat.runs.atomic_folder import damage
from dschat.runs.metrics import restore_metrics
from dschat.runs.output_folder import (
    METRICS,
    STEP_FOLDERS,
    checkpoints_folder,
    claim_other_disk,
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
    run, now = description.run, identity(description, data)
    _check_same_input(data, models if run.output_dir else ())
    storage = _storage(description)
    by_disk = [] if storage.is_shared else gather_holdings(_candidates(run), storage)
    _copy_progress(by_disk, run, storage)
    choice: dict[str, Any] = {}
    if is_main_process():
        try:
            if run.output_dir:
                now["models"] = {model.flag: model.fingerprint() for model in models}
            choice = _choose(description, now, by_disk)
        except UserError as error:
            choice = {"error": str(error)}
    choice = all_gather_object(choice, axis="world")[0]
    chosen = Path(choice["chosen"]) if choice.get("chosen") else None
    if choice.get("flags"):
        restart.order(choice["flags"], choice["message"])
    if "error" in choice:
        raise UserError(choice["error"])
    if chosen is not None and not storage.is_shared:
        problem = complete_disks(chosen, storage, by_disk)
        if problem:
            raise UserError(f"{chosen} could not be copied to every host: {problem}. {STORAGE_REMEDY}")
    if storage.is_writer:
        start_run(description, is_resumed=chosen is not None)
        if chosen is not None and run.output_dir is not None and (chosen / METRICS).is_file():
            restore_metrics(chosen / METRICS, Path(run.output_dir))
    barrier(axis="world")
    return Checkpoints(run, now, chosen, choice["damaged"], storage=storage)


def _check_same_input(data: str, models: Sequence[UpstreamModel]) -> None:
    """Raise `UserError` on every rank where hosts read other data, or start from other weights, than rank 0.

    Files of one name may differ where hosts share no disk.
    """
    if len(set(first_ranks())) == 1:
        return
    is_first = mesh().machine.rank == 0
    mine = {"--data_path": data} | {m.flag: m.fingerprint() for m in models if is_first}
    by_rank = all_gather_object([gethostname(), mine], axis="world")
    for rank, (host, theirs) in enumerate(by_rank):
        for flag, content in theirs.items():
            if content != by_rank[0][1].get(flag, content):
                raise UserError(
                    f"{flag}: the files on {host} (rank {rank}) are others than those on {by_rank[0][0]} "
                    "(rank 0); copy the same ones to every host, or put them on a disk that all share."
                )


def _storage(description: RunDescription) -> Storage:
    """Who sees the same output folder; reported where there are several hosts. Every rank calls it.

    Raises `UserError` where the folder on another host's own disk is not free.
    """
    folder, run = description.run.output_dir, description
    storage = storage_of(Path(folder) if folder else None)
    hosts = all_gather_object(gethostname(), axis="world")
    names = {rank: hosts[rank] for rank in sorted(set(first_ranks()))}
    if folder is None or len(names) == 1:
        return storage
    if storage.is_shared:
        messages.info(f"{len(names)} hosts ({', '.join(names.values())}) share --output_dir {folder}")
        return storage
    disks = "; ".join(" and ".join(names[r] for r in group if r in names) for group in storage.groups)
    messages.info(
        f"{len(names)} hosts do not share --output_dir {folder} ({disks}): each keeps the checkpoints of its "
        "own ranks, and at the end all get the results"
    )
    is_other = storage.is_writer and not is_main_process()
    problem = first_error_across_ranks(lambda: claim_other_disk(run) if is_other else None, axis="world")
    if problem:
        raise UserError(problem)
    return storage


def _candidates(run: RunArguments) -> list[Path]:
    """The checkpoints on this rank's disk that the run may go on from."""
    asked, root = resumes(run), checkpoints_folder(run)
    if asked is None or root is None:
        return []
    return [root / name for name in finished_checkpoints(root)] if asked == "latest" else [Path(asked)]


def _copy_progress(by_disk: Sequence[Holdings], run: RunArguments, storage: Storage) -> None:
    """Let every disk have the progress.json of each checkpoint that is anywhere. Every rank calls it."""
    asked, root = resumes(run), checkpoints_folder(run)
    if not any(by_disk) or asked is None or root is None:
        return
    place = root if asked == "latest" else Path(asked).parent
    names = {f"{name}/{PROGRESS}" for held in by_disk for name in held}
    problem = fetch(place, [name for name in names if not (place / name).is_file()], storage)
    if problem:
        raise UserError(f"{place} cannot be written: {problem}. {STORAGE_REMEDY}")


def _choose(description: RunDescription, now: dict[str, Any], by_disk: Sequence[Holdings]) -> dict[str, Any]:
    """The path of the checkpoint to resume from ("chosen"), and the names of damaged ones ("damaged").

    Where the batches are to be divided among another number of ranks, also the "flags" that do so.
    """
    asked, root = resumes(description.run), checkpoints_folder(description.run)
    if asked is None or root is None:
        return {"chosen": None, "damaged": []}
    if asked != "latest":
        folder = Path(asked)
        is_there = folder.is_dir() or any(folder.name in held for held in by_disk)
        problem = _damage(folder, by_disk) if is_there else "there is no such folder"
        if problem:
            raise UserError(
                f"--resume_from_checkpoint {folder} cannot be used: {problem}; name an intact checkpoint "
                "(output_dir/checkpoints/step_...), or latest for the newest of them."
            )
        return {"chosen": str(folder), "damaged": [], **_compare(folder, description, now)}
    serials = {name: entry["serial"] for held in by_disk for name, entry in held.items()}
    finished = (
        sorted(serials, key=lambda name: serials[name]) if any(by_disk) else list(finished_checkpoints(root))
    )
    damaged: list[str] = []
    for unfinished in sorted(path.name for path in root.glob(STEP_FOLDERS) if path.name not in finished):
        messages.warning(f"checkpoint {root / unfinished} is passed over: {damage(root / unfinished)}.")
    for name in reversed(finished):
        problem = _damage(root / name, by_disk)
        if problem is None:
            fitted = _compare(root / name, description, now)
            messages.info(f"going on from checkpoint {root / name}")
            return {"chosen": str(root / name), "damaged": damaged, **fitted}
        messages.warning(f"checkpoint {root / name} is passed over: {problem}.")
        damaged.append(name)
    if damaged:
        raise UserError(
            f"--resume_from_checkpoint latest: no checkpoint in {root} is intact; to start from the "
            "beginning, give --overwrite_output_dir in its place."
        )
    messages.info(f"--resume_from_checkpoint latest: there is none in {root}; starting from the beginning.")
    return {"chosen": None, "damaged": []}


def _damage(folder: Path, by_disk: Sequence[Holdings]) -> str | None:
    """The damage of a checkpoint in words; None where the disks of all hosts have it whole."""
    return damage_of_all(folder, by_disk or [holdings([folder])])


def _compare(folder: Path, description: RunDescription, now: dict[str, Any]) -> dict[str, Any]:
    """Raise `UserError` where the run is not the one that was saved in `folder`; report other differences.

    Where only the number of ranks is another, and other micro-batches keep the batches as they were, returns
    these "flags", the "message" that says so, and the "error" where the run cannot start again with them.
    """
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
    if saved["world_size"] != now["world_size"] and now["settings"].get("pipeline_parallel_size", 1) > 1:
        raise UserError(
            f"--resume_from_checkpoint {folder}: it was saved on {saved['world_size']} ranks, and this run "
            f"has {now['world_size']}; a pipeline goes on with as many as it was saved on."
        )
    _compare_models(folder, saved["models"], now["models"])
    if saved["data"] != now["data"]:
        raise UserError(
            f"--data_path: what it names has changed since {folder} was saved, so the run cannot go on in "
            "the middle of it; restore the data, or start anew in another --output_dir."
        )
    _report_differences(folder, saved, now, changed)
    return _fitted(folder, description, saved, now)


def _fitted(
    folder: Path, description: RunDescription, saved: dict[str, Any], now: dict[str, Any]
) -> dict[str, Any]:
    """As `_compare`, of the sizes of batches; nothing where they are as they were."""
    ranks, before = now["world_size"], saved["world_size"]
    for product, number in saved["sizes"].items():
        if now["sizes"][product] != number:
            error = (
                f"{product} x ranks is {now['sizes'][product]} and was {number} when {folder} was saved on "
                f"{before} ranks; choose them so that the product is {number} again."
            )
            flags = description.divided(saved["sizes"], mesh().data.size)
            if flags is None or ranks == before:
                raise UserError(error)
            values = " ".join(f"--{name} {value}" for name, value in flags.items())
            message = (
                f"note: {folder} is of {before} ranks and there are {ranks}: the run starts again with "
                f"{values}, so that an optimiser step has the same rows."
            )
            return {"flags": flags, "message": message, "error": error}
    return {}


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
