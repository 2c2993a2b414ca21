"""A DeepSpeed engine in files: weights, optimiser, schedule and loss scaler, each rank its own part."""

import copy
import copyreg
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import IO, Any, cast

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.config import ZeroStageEnum

from dschat.distributed import deepspeed_private
from dschat.distributed.collectives import barrier

# Python 3.11.0 to 3.11.3 write an enum as a call of getattr, which no loader of tensors alone takes.
copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (int(stage),)))

FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class Writer(TorchCheckpointEngine):
    """DeepSpeed's writer, whose failures are kept until every rank is through with its part.

    An exception on one rank in the middle would leave the others waiting in DeepSpeed's collectives.
    """

    problem: str | None = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make the folder."""
        with self._noting_problems():
            super().makedirs(path, exist_ok)

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Write one file."""
        with self._noting_problems(), Path(path).open("wb", buffering=0) as file:
            kept = _ErrorKeepingFile(file)
            try:
                torch.save(state_dict, cast(IO[bytes], kept))
            except RuntimeError as error:  # torch's zip writer makes one of a full disk, without its message
                raise kept.problem or error from error

    @contextmanager
    def _noting_problems(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            self.problem = self.problem or str(error)


class _ErrorKeepingFile:
    """A file to write to that keeps the first error."""

    problem: OSError | None = None

    def __init__(self, file: FileIO) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        """Write all of it."""
        view, done = memoryview(data), 0
        try:
            while done < len(view):
                done += self._file.write(view[done:])
        except OSError as error:
            self.problem = self.problem or error
            raise
        return done

    def flush(self) -> None:
        """Nothing is held back."""


def save_engine(engine: DeepSpeedEngine, folder: Path) -> str | None:
    """Write the engine's state into a new folder; every rank calls it. Returns what went wrong on this rank.

    Frozen weights, of a model with adapters, are left out: they come from where the model came from.
    """
    engine = getattr(engine, "deepspeed", engine)  # of a pipeline's stage
    writer = deepspeed_private.set_checkpoint_writer(engine, Writer)
    has_frozen = not all(parameter.requires_grad for parameter in engine.module.parameters())
    engine.save_checkpoint(
        str(folder.parent), tag=folder.name, save_latest=False, exclude_frozen_parameters=has_frozen
    )
    return writer.problem


def load_engine(engine: DeepSpeedEngine, folder: Path) -> None:
    """Bring a fresh engine of the same shape and number of ranks to where `save_engine` was called.

    Every rank calls it. No file is unpickled but into tensors, plain values and `checkpoint_classes`.
    """
    has_frozen = not all(parameter.requires_grad for parameter in engine.module.parameters())
    with tensors_only():
        engine.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=not has_frozen)


def load_engine_resharded(engine: DeepSpeedEngine, folder: Path, scratch: Path, *, is_writer: bool) -> None:
    """`load_engine` where the number of ranks was another: by DeepSpeed's universal checkpoint.

    One rank of those that see a disk, the writer, brings it to one file per parameter in the new folder
    `scratch`, which they all read. Without ZeRO the files are whole anyway. Every rank calls it.
    """
    if engine.zero_optimization_stage() == 0:
        load_engine(engine, folder)
        return
    universal = scratch / folder.name
    if is_writer:
        with tensors_only():
            deepspeed_private.write_universal_checkpoint(folder, universal)
    barrier(axis="world")
    optimizer = deepspeed_private.inner_optimizer(engine)
    before = [
        {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
    ]
    with deepspeed_private.loading_universal_checkpoint(engine):
        load_engine(engine, universal)
    # At stage 3 DeepSpeed 0.19 gives every group of parameters the settings of the first, and all of them one
    # tensor for Adam's step, which each would count up.
    rates = engine.lr_scheduler.get_last_lr()
    for group, settings, learning_rate in zip(optimizer.param_groups, before, rates, strict=True):
        group.update(settings, lr=learning_rate)
    for state in optimizer.state.values():
        state["step"] = copy.deepcopy(state["step"])
    barrier(axis="world")


@contextmanager
def tensors_only() -> Iterator[None]:
    """Every `torch.load` inside the block, DeepSpeed's among them, has weights_only=True."""
    before = os.environ.get(FORCE)
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals(deepspeed_private.checkpoint_classes()):
            yield
    finally:
        if before is None:
            del os.environ[FORCE]
        else:
            os.environ[FORCE] = before
