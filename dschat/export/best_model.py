"""The best model of a run: kept in best/ while the run goes on, moved to its place at the end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dschat.console import messages
from dschat.distributed.collectives import broadcast_from_rank_0
from dschat.distributed.mesh import is_main_process
from dschat.errors import UserError
from dschat.export.eval_command import EvalCommand
from dschat.export.export import move_export
from dschat.export.manifest import MANIFEST, Manifest, changed_files
from dschat.export.provenance import Provenance
from dschat.fingerprint import files_fingerprint
from dschat.runs.atomic_folder import write_json
from dschat.runs.export_files import remove_export
from dschat.runs.output_folder import BEST

COMMAND = "eval_command"
"""Among the facts: what the command found of the model."""
FOLDER = "best"
"""The folder below a run's output folder."""


class BestModel:
    """The best model of a run, below `output_dir` if that is given. Every rank must make the same calls.

    `target` is the folder below `output_dir` to which the model is moved at the end, and `unit` the word for
    a step in messages.
    """

    def __init__(
        self, output_dir: str | None, *, target: str, unit: str, command: EvalCommand | None = None
    ) -> None:
        """`command` measures each best model, and that of the end."""
        self._command = command
        self.log: Callable[[int, dict[str, float]], None] = lambda step, numbers: None
        """Takes the step of a model and what the command finds of it, as `MetricsLogger.log` does."""
        self.end_of: Callable[[str], None] = lambda phase: None
        """Is told that saving ends, where the command begins, and evaluation, where it ends."""
        self._folder = Path(output_dir) if output_dir else None
        self._target, self._unit = target, unit
        self._manifest: str | None = None  # fingerprint of the model's manifest, which has its checksums
        self.step: int | None = None
        """The step of the best evaluation; None before the first."""
        self.facts: dict[str, Any] = {}
        """JSON values that the caller keeps with the model."""

    def keep(self, step: int, facts: dict[str, Any], export: Callable[[Path], None]) -> None:
        """Make the model of `step` the best one: `export` writes it into the folder that it is given.

        Where it cannot be written, rank 0 prints a warning and the earlier model stays the best.
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
        if self._folder and self._command:
            self.end_of("saving")
            self.facts[COMMAND] = self._command.run(self._folder / FOLDER, step)
            self.end_of("evaluation")
            self.log(step, self.facts[COMMAND])
            if is_main_process():
                write_json(self._folder / BEST, self.state_dict())

    def measured(self, step: int, *, takes_best: bool) -> dict[str, float]:
        """What the command finds of the model of `step`, with which the run ends, in the target.

        Where that is the best it is known, unless the run was killed. Every rank must call it.
        """
        if self._folder is None or self._command is None:
            return {}
        if takes_best and COMMAND in self.facts:
            return self.facts[COMMAND]
        found = self._command.run(self._folder / self._target, step)
        self.log(step, found)
        return found

    def is_there(self) -> bool:
        """Whether there is a best model with intact weights. Rank 0 prints a warning where they are gone."""
        folder = self._folder
        if self.step is None or folder is None:
            return self.step is not None
        place = broadcast_from_rank_0(lambda: self._place_of(folder, self._manifest))
        if place is None:
            messages.warning(
                f"the best model, that after {self._unit} {self.step}, is not in "
                f"{folder / FOLDER} any more: the last one is exported."
            )
        return place is not None

    def move(self, provenance: Provenance) -> None:
        """Move the best model, which must be there, to the target in place of an older one."""
        folder = self._folder
        assert folder is not None  # without a folder there is nothing to move
        place = broadcast_from_rank_0(lambda: self._place_of(folder, self._manifest))
        if place == FOLDER:
            move_export(folder / FOLDER, folder / self._target, provenance)
        elif is_main_process():  # a run that was killed after that has moved it
            remove_export(folder / FOLDER)

    def forget(self, *, weights: bool = False) -> None:
        """Remove best.json, and with `weights` the model in best/, once the run has exported its models."""
        if self._folder and is_main_process():
            (self._folder / BEST).unlink(missing_ok=True)
            if weights:
                remove_export(self._folder / FOLDER)

    def state_dict(self) -> dict[str, Any]:
        """Which model is the best, for JSON. Only on rank 0 is the manifest's fingerprint not None."""
        return {"manifest": self._manifest, "step": self.step, "facts": self.facts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state, or that of the model which best/ holds now. Every rank must call it.

        That may be a later one: of steps after the checkpoint, which the resumed run makes again.
        """
        state = broadcast_from_rank_0(lambda: self._state_of_weights(self._folder, state))
        self._manifest, self.step, self.facts = state["manifest"], state["step"], state["facts"]

    def _state_of_weights(self, folder: Path | None, state: dict[str, Any]) -> dict[str, Any]:
        """The state of the model that is on disk: that of best.json, `state`, or none.

        A run may have been killed between the export and best.json.
        """
        if folder is None:
            return state
        note = folder / BEST
        noted = [json.loads(note.read_text(encoding="utf-8"))] if note.is_file() else []
        for known in [*noted, state]:
            if known["step"] is not None and self._place_of(folder, known["manifest"]) is not None:
                return known
        if noted or state["step"] is not None:
            messages.note("which model best/ holds is not known; the next evaluation replaces it.")
        return {"manifest": None, "step": None, "facts": {}}

    def _place_of(self, root: Path, fingerprint: str | None) -> str | None:
        """The folder below `root` (best or target) with intact weights and a manifest of this fingerprint."""
        for name in (FOLDER, self._target):
            path = root / name / MANIFEST
            if not path.is_file() or not path.with_name("config.json").is_file():
                continue
            if files_fingerprint([path]) != fingerprint:
                continue
            manifest = Manifest.read(path.parent)
            if manifest is not None and not changed_files(manifest, path.parent):
                return name
        return None
