"""Checkpoints of a run in training: when to make one, what is in it, and how a run goes on from it.

output_dir/checkpoints/step_00000120/
    ENGINE/                what DeepSpeed writes of each engine, every rank its own part
    rank_00000.safetensors random states, and the tensors of parts that differ from rank to rank
    rank_00000.json        random states of Python and NumPy
    shared.safetensors     the tensors of parts that every rank holds alike, where there are some
    progress.json          step, values of the parts, settings, sizes, versions
    metrics.jsonl          the metrics so far
    complete.json          checksums of all these; written last
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dschat.arguments import RunArguments, RunDescription
from dschat.checkpoints.engine_state import load_engine, load_engine_resharded, save_engine
from dschat.checkpoints.spread import spread_facts
from dschat.checkpoints.state import PartStates, Progress, collect
from dschat.console import messages
from dschat.distributed.collectives import (
    all_gather_object,
    barrier,
    first_error_across_ranks,
    max_across_ranks,
)
from dschat.distributed.device import current_device
from dschat.distributed.mesh import data_ranks_of, is_main_process, mesh
from dschat.distributed.random_state import random_state, restore_random_state
from dschat.distributed.signals import StopRequests
from dschat.distributed.storage import Storage
from dschat.engines.step import DeepSpeedEngine
from dschat.errors import Stopped
from dschat.runs.atomic_folder import Files, flushed, names_of_files, private_files, put_in_place
from dschat.runs.lock import note_stopping
from dschat.runs.measured_choices import MeasuredChoices
from dschat.runs.output_folder import METRICS, checkpoints_folder, finished_checkpoints
from dschat.runs.started import installed_versions

FORMAT = 4
"""Raise it when older checkpoints cannot be read any more, or a run would not go on as it began.

4: a seed draws other answers than before.
"""

PROGRESS, SHARED = "progress.json", "shared.safetensors"

RANDOM = "random."
"""What the names of random states begin with, beside a rank's own tensors."""

VERSIONED = ("dschat", "torch", "deepspeed", "transformers", "peft")


class Checkpoints:
    """The checkpoints of one run. Every rank makes the same calls in the same order.

    begin_run; load once the engines exist; after each step, `if is_due(step): save(step, ...)`.
    """

    def __init__(
        self,
        run: RunArguments,
        identity: dict[str, Any],
        chosen: Path | None = None,
        damaged: Sequence[str] = (),
        *,
        storage: Storage,
    ) -> None:
        """`identity` is kept beside `chosen`, the verified checkpoint that the run goes on from, if any.

        `storage` says who sees the same output folder.
        """
        recorded = read_progress(chosen).get("choices") if chosen else None
        self.choices = MeasuredChoices(recorded, measures=not run.deterministic)
        """What the run chooses by timing; checkpoints keep it."""
        self._run = run
        self._identity = identity
        self._root = checkpoints_folder(run)
        self._chosen = self._newest = chosen
        self._damaged = damaged
        self._storage = storage
        self._requests = StopRequests(note_stopping)
        self._saved_at = time.monotonic()

    def load(self, engines: Mapping[str, DeepSpeedEngine]) -> Progress:
        """Restore the engines and random states from the chosen checkpoint, if there is one.

        The parts of the run follow with `Progress.restore`, once they exist. From here on a request to stop
        waits for the end of a step.
        """
        self._requests.listen()
        self._saved_at = time.monotonic()
        if self._chosen is None:
            return Progress()
        saved = read_progress(self._chosen)
        same_ranks = saved["world_size"] == mesh().world.size
        for name, engine in engines.items():
            if same_ranks:
                load_engine(engine, self._chosen / name)
            else:
                self._load_resharded(engine, self._chosen / name)
        neighbours = data_ranks_of(saved["world_size"])
        _restore_random_state(_own_file(self._chosen, neighbours[mesh().data.rank % len(neighbours)]))
        shared = self._chosen / SHARED
        by_rank = [] if same_ranks else [_tensors_of(self._chosen, n) for n in neighbours]
        return Progress(
            step=saved["step"],
            values=saved["state"],
            own=_tensors_of(self._chosen, mesh().world.rank) if same_ranks else {},
            by_rank=by_rank,
            shared=load_file(shared) if shared.is_file() else {},
        )

    def rewind(self) -> None:
        """Let the next `load` restore the newest checkpoint, and signals end the program as usual again."""
        self._chosen = self._newest
        self._requests.release()

    def _load_resharded(self, engine: DeepSpeedEngine, folder: Path) -> None:
        assert self._root is not None, "a run without an output folder goes on from no checkpoint"
        scratch = self._root / f".resharded-{folder.parent.name}"
        with private_files():
            load_engine_resharded(engine, folder, scratch, is_writer=self._storage.is_writer)
        if self._storage.is_writer:
            shutil.rmtree(scratch, ignore_errors=True)

    def is_due(self, step: int, *, is_last: bool = False) -> bool:
        """Whether a checkpoint is to be made after this step: its number, the time, or a request to stop.

        One small collective. After the last step a signal ends the program as usual again.
        """
        run = self._run
        is_stop = self._requests.received is not None
        is_late = run.save_minutes > 0 and time.monotonic() - self._saved_at >= 60 * run.save_minutes
        asked = torch.tensor([is_stop, is_late and is_main_process()], dtype=torch.int32)
        stop, late = max_across_ranks(asked.to(current_device()), axis="world").tolist()
        if stop and self._requests.received is None:
            self._requests.received = "another rank's signal"
            note_stopping()
        if is_last:
            self._requests.release()
        on_schedule = run.save_interval > 0 and step % run.save_interval == 0
        is_end = is_last and (run.save_interval > 0 or run.save_minutes > 0)
        return bool(stop or late or on_schedule or is_end)

    def save(
        self,
        step: int,
        *,
        engines: Mapping[str, DeepSpeedEngine],
        parts: Mapping[str, Any],
    ) -> None:
        """Make a checkpoint of engines and of parts, each `Stateful` or a value for JSON itself.

        One that cannot be written is warned of, and the run goes on: the earlier ones are kept. Where a
        signal has asked for it, the run ends with `Stopped` after that.
        """
        if self._root is not None:
            with private_files():
                problem = self._write(self._root, step, engines, collect(parts))
            self._saved_at = time.monotonic()
            if problem:
                messages.warning(
                    f"no checkpoint at step {step}: {problem}; {self._kept()}. Make room or "
                    "repair the disk; it is tried again when the next one is due."
                )
        if self._requests.received is not None:
            self._requests.release()
            raise Stopped(self._stop_message(step))

    def _write(
        self, root: Path, step: int, engines: Mapping[str, DeepSpeedEngine], states: PartStates
    ) -> str | None:
        """Write, flush, move, mark, delete older ones. Returns on every rank what went wrong on any."""
        target = root / f"step_{step:08d}"
        temporary = root / f".saving-{target.name}"
        storage = self._storage
        problem = first_error_across_ranks(
            lambda: self._make(temporary) if storage.is_writer else None, axis="world"
        )
        if problem is None:
            problems = [save_engine(engine, temporary / name) for name, engine in engines.items()]

            def write_own() -> str | None:
                of_engines = next(filter(None, problems), None)
                if of_engines is None:
                    self._write_own(temporary, step, states)
                return of_engines

            problem = first_error_across_ranks(write_own, axis="world")
        if problem is None:
            problem, found = _measured_files(temporary, storage)
        if problem is None:
            serials = all_gather_object(max(finished_checkpoints(root).values(), default=0), axis="world")
            finish = partial(self._finish, root, temporary, target, found, 1 + max(serials))
            problem = first_error_across_ranks(lambda: finish() if storage.is_writer else None, axis="world")
        if problem is None:
            self._newest = target
        elif storage.is_writer:
            shutil.rmtree(temporary, ignore_errors=True)
        barrier(axis="world")
        return problem

    def _make(self, temporary: Path) -> None:
        shutil.rmtree(temporary, ignore_errors=True)  # of an attempt that failed
        temporary.mkdir(parents=True, mode=0o700)

    def _write_own(self, folder: Path, step: int, states: PartStates) -> None:
        numbers, random_tensors = random_state()
        own = _own_file(folder, mesh().world.rank)
        named = {RANDOM + name: tensor for name, tensor in random_tensors.items()}
        _save_tensors({**named, **states.own}, own.with_suffix(".safetensors"))
        own.with_suffix(".json").write_text(json.dumps(numbers))
        if self._storage.is_writer:
            if states.shared:
                _save_tensors(states.shared, folder / SHARED)
            described = {
                **self._identity,
                "step": step,
                "choices": self.choices.made,
                "state": states.values,
            }
            (folder / PROGRESS).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
            assert self._run.output_dir is not None, "checkpoints lie in the output folder"
            metrics = Path(self._run.output_dir) / METRICS
            if metrics.is_file():
                shutil.copyfile(metrics, folder / METRICS)

    def _finish(self, root: Path, temporary: Path, target: Path, found: Sequence[Files], serial: int) -> None:
        """Complete the checkpoint on this writer's disk; `found` are the files that each rank measured."""
        files = {name: entry for rank in self._storage.own for name, entry in found[rank].items()}
        facts = {} if self._storage.is_shared else spread_facts(self._storage, found)
        put_in_place(temporary, target, files, serial=serial, **facts)
        others = finished_checkpoints(root)
        limit = self._run.save_total_limit
        others.pop(target.name, None)
        intact = [name for name in others if name not in self._damaged]
        old = intact[: max(0, len(intact) - (limit - 1))] if limit else []
        for name in old + [name for name in self._damaged if name != target.name and limit]:
            shutil.rmtree(root / name, ignore_errors=True)
        self._damaged = ()

    def _kept(self) -> str:
        return f"the previous one, {self._newest}, is kept" if self._newest else "there is no earlier one"

    def _stop_message(self, step: int) -> str:
        asked = f"stopped after step {step} as {self._requests.received} asked"
        if self._root is None:
            return f"{asked}; without --output_dir nothing could be kept."
        if self._newest is None:
            return f"{asked}; no checkpoint could be written."
        return f"{asked}; saved in {self._newest}. Go on with --resume_from_checkpoint latest."


def identity(description: RunDescription, data: str) -> dict[str, Any]:
    """What a run must have in common with the one that it goes on with, or may not.

    `data` is a fingerprint; those of the models, by flag, are for the caller to fill in.
    """
    return {
        "format": FORMAT,
        "program": description.step,
        "data": data,
        "models": {},
        "world_size": mesh().world.size,
        "sizes": description.global_sizes(mesh().data.size),
        "settings": {name: setting.value for name, setting in description.settings.items()},
        "versions": installed_versions(VERSIONED),
    }


def _measured_files(folder: Path, storage: Storage) -> tuple[str | None, list[Files]]:
    """What went wrong on any rank, and the files that each has flushed and measured. Every rank calls it.

    The ranks that see a disk share its files out among them.
    """
    listed = all_gather_object(names_of_files(folder) if storage.is_writer else [], axis="world")
    own, mine = storage.own, Files()
    names = listed[own[0]][own.index(mesh().world.rank) :: len(own)]
    problem = first_error_across_ranks(lambda: mine.update(flushed(folder, names)), axis="world")
    return problem, all_gather_object(mine, axis="world")


def read_progress(folder: Path) -> dict[str, Any]:
    """The progress.json of a checkpoint."""
    return json.loads((folder / PROGRESS).read_text(encoding="utf-8"))


def _own_file(folder: Path, number: int) -> Path:
    """What a rank writes for itself, without the suffix."""
    return folder / f"rank_{number:05d}"


def _restore_random_state(own: Path) -> None:
    """Restore the random states of a rank's own files."""
    tensors = load_file(own.with_suffix(".safetensors"))
    random_tensors = {name.removeprefix(RANDOM): t for name, t in tensors.items() if name.startswith(RANDOM)}
    restore_random_state(json.loads(own.with_suffix(".json").read_text()), random_tensors)


def _tensors_of(folder: Path, number: int) -> dict[str, Tensor]:
    """What that rank gave to `save`."""
    tensors = load_file(_own_file(folder, number).with_suffix(".safetensors"))
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(RANDOM)}


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
