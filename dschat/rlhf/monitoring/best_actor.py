"""The models that step 3 writes: the best actor while it runs, and what there is in the end."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from dschat.console import messages
from dschat.export.best_model import BestModel
from dschat.export.eval_command import EvalCommand
from dschat.export.export import export_model
from dschat.export.provenance import Provenance
from dschat.rlhf.monitoring.gains import Answers, did_it_help, gained_objective, gained_score
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.rlhf.roles import EngineSpec

OBJECTIVE = "eval_objective"
"""What the best actor is better in. Its beta is the first, lest a beta that is steered choose the actor."""

WARNED = (
    ", as no evaluation before the guard's warnings was better by more than noise: give a smaller "
    "--eval_interval or a larger --kl_coef. The last actor, of which the guard warned,"
)


class Exports:
    """Writes models below --output_dir, if there is one. Every rank must make the same calls.

    `provenance_of` is `step_provenance` with the description and the data of the run.
    """

    def __init__(
        self,
        engine: DeepSpeedRLHFEngine,
        tokenizer: PreTrainedTokenizerBase,
        provenance_of: Callable[..., Provenance],
        *,
        output_dir: str | None,
        export_actor: Literal["best", "last"],
        command: EvalCommand | None = None,
    ) -> None:
        self._engine, self._tokenizer, self._provenance_of = engine, tokenizer, provenance_of
        self._actor, *self._others = (spec for spec in engine.specs if spec.trained)
        self._choice = export_actor
        self._folder = Path(output_dir) if output_dir else None
        self.best = BestModel(output_dir, target="actor", unit="PPO step", command=command)
        self._start: Answers | None = None
        self._start_metrics: dict[str, float] = {}
        self._last: Answers | None = None
        self._last_step: int | None = None  # None where the guard warned of the last evaluation

    @property
    def best_step(self) -> int | None:
        """The PPO step of the best evaluation so far (0: before the first), None without one."""
        return self.best.step

    def offer(
        self, step: int, evaluation: dict[str, float], answers: Answers, *, is_warned_of: bool = False
    ) -> None:
        """Write the actor into best/ where it is better than the best before by more than its noise.

        The first evaluation is that of the start. What the guard warns of is no best actor.
        """
        metrics = {name: value for name, value in evaluation.items() if name.startswith("eval_")}
        if self._start is None:
            self._start, self._start_metrics = answers, metrics
        self._last, self._last_step = answers, None if is_warned_of else step
        if is_warned_of or not math.isfinite(evaluation[OBJECTIVE]) or not self._is_better(answers):
            return
        facts = {"figures": metrics, "answers": asdict(answers)}
        provenance = self._provenance(self._actor, {"ppo_step": step, **metrics})
        self.best.keep(step, facts, lambda folder: self._export_actor(folder, provenance))

    def _is_better(self, answers: Answers) -> bool:
        if self.best.step is None:
            return True
        gained = gained_objective(self._best_answers, answers)
        return gained.mean > 0 and gained.is_beyond_noise

    @property
    def _best_answers(self) -> Answers:
        return Answers(**self.best.facts["answers"])

    def finish(self, step: int, metrics: dict[str, float]) -> dict[str, Any]:
        """Write what the run ends with; actor/ gets the best actor, moved there, or the last one.

        `step` is the last PPO step and `metrics` are its. Returns what a summary tells of them.
        """
        taken = self.best_step if self._takes_best(step) and self.best.is_there() else None
        takes_best = taken is not None
        gains = self._gains(takes_best, step)
        actor_step = step if taken is None else taken
        of_last = {"ppo_step": step, **metrics}
        of_actor = {"ppo_step": actor_step, **self.best.facts["figures"]} if takes_best else of_last
        verdict = gains.pop("verdict", None)
        provenance = self._provenance(self._actor, {**of_actor, **gains}, verdict=verdict)
        if self._folder and takes_best:
            self.best.move(provenance)
        elif self._folder:
            self._export_actor(self._folder / "actor", provenance)
        if self._folder:
            self._export_others(self._folder, of_last)
        measured = self.best.measured(actor_step, takes_best=takes_best)
        self.best.forget(weights=self._choice == "best")
        self._say_which(actor_step, step, verdict)
        figures = {f"best_{name}": value for name, value in self.best.facts.get("figures", {}).items()}
        best = {"best_step": self.best_step, **figures} if figures else {}
        gained = {"verdict": verdict, **gains} if verdict else {}
        return {"actor_step": actor_step, **measured, **best, **gained}

    def _takes_best(self, step: int) -> bool:
        """Whether actor/ is to be the best actor.

        Where that is the start, as nothing was better by more than noise, the last one is taken unless it is
        worse by more than noise: the start is in its own folder still.
        """
        if self._choice != "best" or self.best_step is None:
            return False
        if self.best_step > 0 or step == 0 or self._last_step != step:
            return True
        assert self._last is not None, "the best actor was found by an evaluation"
        lost = gained_objective(self._best_answers, self._last)
        return not math.isfinite(lost.mean) or (lost.mean < 0 and lost.is_beyond_noise)

    def _gains(self, takes_best: bool, step: int) -> dict[str, Any]:
        """The evaluation of the start, and what actor/ gains over it; nothing without evaluations."""
        if self._start is None or self._last is None:  # the first evaluation sets both
            return {}
        exported = self._best_answers if takes_best else self._last
        score, objective = gained_score(self._start, exported), gained_objective(self._start, exported)
        is_start = takes_best and self.best_step == 0
        verdict = did_it_help(self._start, self._last if is_start else exported)
        if is_start and step > 0:
            last = ": the last actor" if self._last_step == step else WARNED
            verdict = f"the start itself{last} is {verdict}"
        return {
            **{f"initial_{name}": value for name, value in self._start_metrics.items()},
            "score_gain": score.mean,
            "score_gain_stderr": score.stderr,
            "objective_gain": objective.mean,
            "objective_gain_stderr": objective.stderr,
            "verdict": verdict,
        }

    def _say_which(self, actor_step: int, step: int, verdict: str | None) -> None:
        if self.best_step is not None:
            which = f"the best actor is that after PPO step {self.best_step}"
            if self.best_step == 0:
                which = "no actor of which the guard did not warn is better than the start by more than noise"
            messages.info(
                f"{which}, {OBJECTIVE} {self.best.facts['figures'][OBJECTIVE]:.4g}; the last PPO step was "
                f"{step}. actor/ is that after PPO step {actor_step} (--export_actor {self._choice})."
            )
        if verdict:
            messages.info(f"did PPO help? actor/ is {verdict}")

    def _provenance(self, spec: EngineSpec, metrics: dict[str, Any], **more: Any) -> Provenance:
        return self._provenance_of(spec.path, metrics=metrics, **more)

    def _export_actor(self, folder: Path, provenance: Provenance) -> None:
        export_model(self._engine.actor, self._tokenizer, folder, provenance=provenance)

    def _export_others(self, folder: Path, metrics: dict[str, Any]) -> None:
        """Write the critic and the moving average as the last PPO step left them."""
        engine, tokenizer = self._engine, self._tokenizer
        for spec in self._others:
            provenance = self._provenance(spec, metrics, head=spec.head)
            export_model(engine.by_role[spec.role], tokenizer, folder / spec.role, provenance=provenance)
        if engine.ema:
            export_model(
                engine.actor,
                tokenizer,
                folder / "actor_ema",
                parameters=engine.ema.weights(),
                provenance=self._provenance(self._actor, metrics),
            )

    def state_dict(self) -> dict[str, Any]:
        """Which actor is the best, and what the start and the last are compared by, for JSON."""
        return {
            "best": self.best.state_dict(),
            "start": asdict(self._start) if self._start else None,
            "start_figures": self._start_metrics,
            "last": asdict(self._last) if self._last else None,
            "last_step": self._last_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, as `BestModel.load_state_dict` does. Every rank must call it."""
        self.best.load_state_dict(state["best"])
        self._start = Answers(**state["start"]) if state["start"] else None
        self._start_metrics = state["start_figures"]
        self._last = Answers(**state["last"]) if state["last"] else None
        self._last_step = state["last_step"]
