"""What a finished run leaves on hosts that do not share its output folder: the same results on each."""

from pathlib import Path

from dschat.distributed.collectives import broadcast_from_rank_0
from dschat.distributed.mesh import is_main_process
from dschat.distributed.storage import fetch, storage_of
from dschat.errors import STORAGE_REMEDY, UserError
from dschat.runs.output_folder import LOG, PROFILE, SUMMARY, TRACKERS

OF_ONE_HOST = ("checkpoints", "tensorboard", "wandb", "mlruns", TRACKERS, PROFILE, LOG)
"""What stays where it is: checkpoints, trackers' files, traces and the console of rank 0."""


def copy_results(output_dir: str | None) -> None:
    """Copy models and metrics to the hosts that do not see rank 0's output folder, the summary last.

    Every rank calls it at the end of a run, so that the next step finds its model on every host. Raises
    `UserError` on every rank where a disk is full or broken.
    """
    folder = Path(output_dir) if output_dir else None
    storage = storage_of(folder)
    if folder is None or storage.is_shared:
        return
    names: list[str] = broadcast_from_rank_0(lambda: _names(folder))
    for part in ([name for name in names if name != SUMMARY], [SUMMARY]):
        problem = fetch(folder, () if is_main_process() else part, storage)
        if problem:
            raise UserError(
                f"the results in {folder} could not be copied to every host: {problem}. {STORAGE_REMEDY}"
            )


def _names(folder: Path) -> list[str]:
    """The files of the results, by their paths in the folder."""
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    kept = [name for name in names if name.parts[0] not in OF_ONE_HOST and name.suffix != ".lock"]
    return sorted(map(str, kept))
