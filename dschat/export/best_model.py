"""The model of a run's best evaluation so far: kept in best/ meanwhile, moved in the end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dschat.console import messages
from dschat.distributed.collectives import broadcast_from_rank_0
from dschat.distributed.mesh import is_main_process
from dschat.errors import UserError
from dschat.export.export import move_export
from dschat.export.manifest import MANIFEST, Manifest, changed_files
from dschat.export.model_card import Provenance
from dschat.fingerprint import files_fingerprint
from dschat.runs.atomic_folder import write_json
from dschat.runs.export_files import remove_export
from dschat.runs.output_folder import BEST

FOLDER = "best"


class BestModel:
    """Keeps one model below `output_dir`, if there is one. Every rank must make the same calls.

    `step` is that of its evaluation, None without one, and `facts`, for JSON, are what the caller wants to
    remember of it. `target` is the folder below `output_dir` to which it is moved in the end.
    """

    def __init__(self, output_dir: str | None, *, target: str, unit: str) -> None:
        self._folder = Path(output_dir) if output_dir else None
        self._target, self._unit = target, unit
        self._manifest: str | None = None  # the fingerprint of the model's, which has its checksums
        self.step: int | None = None
        self.facts: dict[str, Any] = {}

    def keep(self, step: int, facts: dict[str, Any], export: Callable[[Path], None]) -> None:
        """Let `export` write the model into the folder that it is given; it is the best from now on.

        Where it cannot be written, the earlier one stays the best, and the run goes on.
        """
        try:
            if self._folder:
                export(self._folder / FOLDER)
        except UserError as error:
            kept = "none" if self.step is None else f"that of {self._unit} {self.step}"
            messages.warning(f"{self._unit} {step} has the best model so far, but {error} Kept is {kept}.")
            return
        self.step, self.facts = step, facts
        if self._folder and is_main_process():
            self._manifest = files_fingerprint([self._folder / FOLDER / MANIFEST])
            write_json(self._folder / BEST, self.state_dict())

    def is_there(self) -> bool:
        """Whether there is a best model and its weights can be exported; says so where they are gone."""
        if self.step is None:
            return False
        if self._folder is None:
            return True
        place = broadcast_from_rank_0(lambda: self._place_of(self._manifest))
        if place is None:
            messages.warning(
                f"the best model, that after {self._unit} {self.step}, is not in "
                f"{self._folder / FOLDER} any more: the last one is exported."
            )
        return place is not None

    def move(self, provenance: Provenance) -> None:
        """Let the best model, which is there, take the place of an older one in the target."""
        place = broadcast_from_rank_0(lambda: self._place_of(self._manifest))
        if place == FOLDER:
            move_export(self._folder / FOLDER, self._folder / self._target, provenance)
        elif is_main_process():  # a run that was killed after that has moved it
            remove_export(self._folder / FOLDER)

    def forget(self, *, weights: bool = False) -> None:
        """Remove the note of what best/ holds, and its `weights`: the run has exported what it should."""
        if self._folder and is_main_process():
            (self._folder / BEST).unlink(missing_ok=True)
            if weights:
                remove_export(self._folder / FOLDER)

    def state_dict(self) -> dict[str, Any]:
        """Which model is the best, for JSON; its manifest on rank 0 alone."""
        return {"manifest": self._manifest, "step": self.step, "facts": self.facts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, with the best model that best/ holds now.

        It may be a later one than the state's, of steps that are made again, on some devices a little
        differently. Every rank must call it.
        """
        state = broadcast_from_rank_0(lambda: self._true_state(state))
        self._manifest, self.step, self.facts = state["manifest"], state["step"], state["facts"]

    def _true_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state that fits the weights that are there; a run may have been killed before it noted them."""
        if self._folder is None:
            return state
        note = self._folder / BEST
        noted = [json.loads(note.read_text(encoding="utf-8"))] if note.is_file() else []
        for known in [*noted, state]:
            if known["step"] is not None and self._place_of(known["manifest"]) is not None:
                return known
        if noted or state["step"] is not None:
            messages.note("which model best/ holds is not known; the next evaluation replaces it.")
        return {"manifest": None, "step": None, "facts": {}}

    def _place_of(self, manifest: str | None) -> str | None:
        """Where the weights are whose manifest has this fingerprint: best, the target or nowhere."""
        for name in (FOLDER, self._target):
            path = self._folder / name / MANIFEST
            if not path.is_file() or not path.with_name("config.json").is_file():
                continue
            is_same = files_fingerprint([path]) == manifest
            if is_same and not changed_files(Manifest.read(path.parent), path.parent):
                return name
        return None
