"""The models that step 3 writes: the best actor while it runs, and what there is in the end."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dschat.arguments import ModelArguments, RlhfArguments
from dschat.checkpoint import export_model, move_export
from dschat.data.cache import files_fingerprint
from dschat.data.preparation import SplitData
from dschat.distributed import gather_json, is_main_process, print_once
from dschat.durable import write_json
from dschat.errors import UserError
from dschat.export_files import remove_export
from dschat.manifest import MANIFEST, Manifest, changed_files
from dschat.model_card import Provenance, step_provenance
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.run_folder import BEST

OBJECTIVE = "eval_objective"
"""The best actor has the largest. Its beta is the first, lest a beta that is steered choose the actor."""


class Exports:
    """Writes models below --output_dir, if there is one. Every rank must make the same calls.

    `best_step` is the PPO step of the best evaluation so far (0: before the first), None without one.
    """

    def __init__(
        self,
        args: RlhfArguments,
        engine: DeepSpeedRLHFEngine,
        tokenizer: PreTrainedTokenizerBase,
        data: SplitData,
    ) -> None:
        self._args, self._engine, self._tokenizer, self._data = args, engine, tokenizer, data
        self._folder = Path(args.run.output_dir) if args.run.output_dir else None
        self._best: dict[str, float] = {}
        self._manifest: str | None = None  # the fingerprint of the best actor's, which has its checksums
        self.best_step: int | None = None

    def offer(self, step: int, evaluation: dict[str, float]) -> None:
        """Write the actor into best/ where its evaluation is better than all before.

        Where it cannot be written, the earlier one stays the best, and the run goes on.
        """
        if not evaluation[OBJECTIVE] > self._best.get(OBJECTIVE, -math.inf):  # nor is NaN
            return
        best = {name: value for name, value in evaluation.items() if name.startswith("eval_")}
        try:
            if self._folder:
                self._export_actor("best", self._provenance(self._args.actor, {"ppo_step": step, **best}))
        except UserError as error:
            kept = "none" if self.best_step is None else f"that of PPO step {self.best_step}"
            print_once(f"WARNING: PPO step {step} has the best actor so far, but {error} Kept is {kept}.")
            return
        self._best, self.best_step = best, step
        if self._folder and is_main_process():
            self._manifest = files_fingerprint([self._folder / "best" / MANIFEST])
            write_json(self._folder / BEST, self.state_dict())

    def finish(self, step: int, figures: dict[str, float]) -> dict[str, Any]:
        """Write what the run ends with; actor/ gets the best actor, moved there, or the last one.

        `step` is the last PPO step and `figures` are its. Returns what a summary tells of them.
        """
        takes_best = self._args.guard.export_actor == "best" and self.best_step is not None
        if self._folder:
            of_actor = self._provenance(self._args.actor, {"ppo_step": step, **figures})
            takes_best = takes_best and self._move_best(of_actor)
            if not takes_best:
                self._export_actor("actor", of_actor)
            self._export_others(of_actor)
            if is_main_process():
                (self._folder / BEST).unlink(missing_ok=True)
        actor_step = self.best_step if takes_best else step
        self._say_which(actor_step, step)
        best = {f"best_{name}": value for name, value in self._best.items()}
        return {"actor_step": actor_step} | ({"best_step": self.best_step, **best} if best else {})

    def _move_best(self, of_actor: Provenance) -> bool:
        """Let actor/ be the best actor; False where its weights are not there any more."""
        place = gather_json(self._place_of(self._manifest) if is_main_process() else None)[0]
        if place is None:
            print_once(
                f"WARNING: the best actor, that after PPO step {self.best_step}, is not in "
                f"{self._folder / 'best'} any more: actor/ gets the last one."
            )
        elif place == "actor":  # a run that was killed after that has moved it
            if is_main_process():
                remove_export(self._folder / "best")
        else:
            of_best = replace(of_actor, figures={"ppo_step": self.best_step, **self._best})
            move_export(self._folder / "best", self._folder / "actor", of_best)
        return place is not None

    def _say_which(self, actor_step: int, step: int) -> None:
        if self.best_step is None:
            return
        start = " (that the run started from: nothing that it learned was better)"
        print_once(
            f"the best actor is that after PPO step {self.best_step}{start if self.best_step == 0 else ''}, "
            f"{OBJECTIVE} {self._best[OBJECTIVE]:.4g}; the last PPO step was {step}. actor/ is that after "
            f"PPO step {actor_step} (--export_actor {self._args.guard.export_actor})."
        )

    def _provenance(self, base: ModelArguments, figures: dict[str, Any], **more: Any) -> Provenance:
        return step_provenance(self._args, base, self._data, figures, **more)

    def _export_actor(self, name: str, provenance: Provenance) -> None:
        export_model(self._engine.actor, self._tokenizer, self._folder / name, provenance=provenance)

    def _export_others(self, of_actor: Provenance) -> None:
        """Critic and moving average as the last PPO step left them."""
        engine, tokenizer, folder = self._engine, self._tokenizer, self._folder
        if engine.critic:
            base = self._args.actor if engine.fresh_critic else self._args.critic
            of_critic = self._provenance(base, of_actor.figures, head="value")
            export_model(engine.critic, tokenizer, folder / "critic", provenance=of_critic)
        if engine.ema:
            average = engine.ema.weights()
            export_model(
                engine.actor, tokenizer, folder / "actor_ema", parameters=average, provenance=of_actor
            )

    def state_dict(self) -> dict[str, Any]:
        """Which actor is the best, for JSON; its manifest on rank 0 alone."""
        return {"manifest": self._manifest, "best_step": self.best_step, "best": dict(self._best)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, with the best actor that best/ holds now.

        It may be a later one than the state's, of steps that are made again, on some devices a little
        differently. Every rank must call it.
        """
        state = gather_json(self._true_state(state) if is_main_process() else None)[0]
        self._manifest = state.get("manifest")  # states of earlier versions have none
        self.best_step, self._best = state["best_step"], dict(state["best"])

    def _true_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state that fits the weights that are there; a run may have been killed before it noted them."""
        if self._folder is None:
            return state
        note = self._folder / BEST
        noted = [json.loads(note.read_text(encoding="utf-8"))] if note.is_file() else []
        for known in [*noted, state]:
            if known["best_step"] is not None and self._place_of(known.get("manifest")):
                return known
        if noted or state["best_step"] is not None:
            print_once("note: which actor best/ holds is not known; the next evaluation replaces it.")
        return {"best_step": None, "best": {}}

    def _place_of(self, manifest: str | None) -> str | None:
        """Where the weights are whose manifest has this fingerprint: best, actor or nowhere."""
        for name in ("best", "actor"):
            path = self._folder / name / MANIFEST
            if not path.is_file() or not path.with_name("config.json").is_file():
                continue
            if manifest is None:  # a state of an earlier version
                return name
            if files_fingerprint([path]) == manifest and not changed_files(
                Manifest.read(path.parent), path.parent
            ):
                return name
        return None
