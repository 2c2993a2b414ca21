"""The model that steps 1 and 2 and DPO write: that of the best evaluation, or that of the last step."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dschat.console import messages
from dschat.data.preparation import SplitData
from dschat.distributed.mesh import is_main_process
from dschat.engines.step import DeepSpeedEngine
from dschat.export.best_model import BestModel
from dschat.export.eval_command import EvalCommand
from dschat.export.export import export_model
from dschat.export.provenance import Provenance, step_provenance
from dschat.export.verdict import Evaluation, is_good
from dschat.runs.output_folder import write_summary
from dschat.supervised.pair_report import PairReport, announce_report
from dschat.supervised.settings import SupervisedSettings

VerdictOf = Callable[[Sequence[Evaluation]], str]


class ModelExports:
    """Writes a model into --output_dir, if there is one. Every rank must make the same calls.

    The best is the one of the lowest evaluation loss, the model before training left out. `verdict_of` says
    in words what the evaluations up to that of a model tell of it; `report` is written beside it.
    """

    def __init__(
        self,
        settings: SupervisedSettings,
        engine: DeepSpeedEngine,
        tokenizer: PreTrainedTokenizerBase,
        data: SplitData,
        *,
        verdict_of: VerdictOf | None = None,
        report: PairReport | None = None,
    ) -> None:
        self._settings, self._engine, self._tokenizer, self._data = settings, engine, tokenizer, data
        self._verdict_of, self._report = verdict_of, report
        command = EvalCommand.of(settings.run)
        self.best = BestModel(settings.run.output_dir, target="", unit="step", command=command)

    def offer(self, evaluations: Sequence[Evaluation]) -> None:
        """Write the model into best/ where --export_model wants it and the last evaluation is the best."""
        takes_part = self._settings.batch.export_model == "best" and evaluations and evaluations[-1].step > 0
        if takes_part and evaluations[-1].loss < self.best.facts.get("loss", math.inf):  # nor is NaN
            step, loss = evaluations[-1].step, evaluations[-1].loss
            self.best.keep(step, {"loss": loss}, lambda folder: self._export(folder, step, evaluations))

    def finish(self, step: int, evaluations: Sequence[Evaluation], seconds: float) -> None:
        """Write what the run, whose last step is `step`, ends with, and last of all the summary."""
        takes_best = self.best.is_there()
        model_step = self.best.step if takes_best and self.best.step is not None else step
        until = [evaluation for evaluation in evaluations if evaluation.step <= model_step]
        provenance = self._provenance(model_step, until)
        if self._settings.run.output_dir and takes_best:
            self.best.move(provenance)
        elif self._settings.run.output_dir:
            self._export(Path(self._settings.run.output_dir), step, until)
        measured = self.best.measured(model_step, takes_best=takes_best)
        self.best.forget(weights=True)
        last: dict[str, Any] = {}
        if model_step != step:
            last = {f"last_{name}": value for name, value in evaluations[-1].figures.items()}
            messages.info(
                f"the exported model is that after step {model_step}, of the lowest evaluation loss, "
                f"{until[-1].loss:.4g}; that after step {step}, the last, has {evaluations[-1].loss:.4g} "
                "(--export_model best)."
            )
            if self._verdict_of:
                last["last_verdict"] = self._verdict_of(evaluations)
                messages.info(f"verdict on the model after step {step}, not exported: {last['last_verdict']}")
        if provenance.verdict:
            warning = "" if is_good(provenance.verdict) else "WARNING: "
            messages.info(f"{warning}verdict on the reward model: {provenance.verdict}")
        if self._report and self._settings.run.output_dir and is_main_process():
            announce_report(Path(self._settings.run.output_dir))
        if is_main_process():
            counts = {"num_train_rows": len(self._data.train), "num_eval_rows": len(self._data.evaluation)}
            verdict = {"verdict": provenance.verdict} if provenance.verdict else {}
            summary = {"step": provenance.step, **provenance.metrics, **last, **measured, **verdict, **counts}
            write_summary(self._settings.run.output_dir, {**summary, "seconds": seconds})

    def _export(self, folder: Path, step: int, evaluations: Sequence[Evaluation]) -> None:
        provenance = self._provenance(step, evaluations)
        write_report = self._report.writer() if self._report else None
        export_model(self._engine, self._tokenizer, folder, provenance=provenance, write_report=write_report)

    def _provenance(self, step: int, evaluations: Sequence[Evaluation]) -> Provenance:
        """That of the model after so many steps, with the figures of the first and the last evaluation."""
        metrics: dict[str, Any] = {"model_step": step}
        if evaluations:
            metrics |= {f"initial_{name}": value for name, value in evaluations[0].figures.items()}
            metrics |= evaluations[-1].figures
        verdict = self._verdict_of(evaluations) if self._verdict_of else None
        return step_provenance(
            self._settings.description,
            self._settings.model.model_name_or_path,
            self._data,
            metrics,
            verdict=verdict,
        )

    def state_dict(self) -> dict[str, Any]:
        """Which model is the best, for JSON."""
        return self.best.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, as `BestModel.load_state_dict` does. Every rank must call it."""
        self.best.load_state_dict(state)
