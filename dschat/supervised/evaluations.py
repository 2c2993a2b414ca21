"""The evaluations of steps 1 and 2 and of DPO: made, logged, kept in order."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dschat.console import messages
from dschat.data.loaders import EvalLoader
from dschat.distributed.collectives import sum_across_ranks
from dschat.engines.memory_remedies import PhaseKind
from dschat.engines.out_of_memory import phase
from dschat.engines.pipeline import of_last_stage, results_of
from dschat.engines.step import DeepSpeedEngine
from dschat.export.verdict import Evaluation
from dschat.runs.metrics import MetricsLogger
from dschat.runs.registry import metric

Metrics = dict[str, float]
Evaluate = Callable[[DeepSpeedEngine, EvalLoader], Metrics]


class Evaluations:
    """Evaluates a model on examples that it never learns from. Every rank must make the same calls.

    Some evaluations take all examples and some, `short`, a part of them. Where there are short ones, all are
    compared by that part.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        evaluate: Evaluate,
        metrics: MetricsLogger,
        *,
        whole: EvalLoader,
        short: EvalLoader | None,
    ) -> None:
        self._engine, self._evaluate, self._metrics = engine, evaluate, metrics
        self._whole, self._short = whole, short
        self._loss_sum, self._num_losses = 0.0, 0
        self.all: list[Evaluation] = []

    @property
    def last_step(self) -> int | None:
        """The optimiser steps that were taken before the last evaluation, None without one."""
        return self.all[-1].step if self.all else None

    def take_in(self, train_loss: float) -> None:
        """Note the loss of an optimiser step."""
        self._loss_sum += train_loss
        self._num_losses += 1

    def make(self, step: int, moment: str, *, is_short: bool = False) -> None:
        """Evaluate after so many optimiser steps, log the metrics and print them; nothing without data."""
        loss = None
        if self._short and not is_short and len(self._short.order) < len(self._whole.order):
            loss = self._measure(self._short)["eval_loss"]  # first, so that reports are of the whole
        metrics = self._measure(self._short if is_short and self._short is not None else self._whole)
        if not metrics:
            return
        self._metrics.log(step, metrics)
        messages.info(f"{moment}: {main_metrics(metrics)}")
        loss = metrics["eval_loss"] if loss is None else loss
        train_loss = self._loss_sum / self._num_losses if self._num_losses else None
        self._loss_sum, self._num_losses = 0.0, 0
        self.all.append(Evaluation(step, metrics, loss, train_loss))

    def repeat(self) -> None:
        """Evaluate on all examples again and log nothing: for a report on what an earlier start evaluated."""
        self._measure(self._whole)

    @phase(PhaseKind.EVALUATING)
    @torch.no_grad()
    def _measure(self, loader: EvalLoader) -> Metrics:
        self._engine.eval()
        return of_last_stage(self._evaluate(self._engine, loader))

    def state_dict(self) -> dict[str, Any]:
        """All evaluations, for JSON."""
        return {
            "all": [asdict(evaluation) for evaluation in self.all],
            "losses": [self._loss_sum, self._num_losses],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.all = [Evaluation(**values) for values in state["all"]]
        self._loss_sum, self._num_losses = state["losses"]


def sum_over_batches(
    engine: DeepSpeedEngine, loader: EvalLoader, sums_of: Callable[[DeepSpeedEngine, Any], dict[str, Tensor]]
) -> dict[str, float]:
    """The totals in fp64, over all batches of all ranks, of the scalars that `sums_of` returns for a batch.

    Nothing where the loader has no batches, and in all stages of a pipeline but the last. Every rank must
    call it.
    """
    names: list[str] = []
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    batches = (batch.to(engine.device) for batch in loader)
    for sums in results_of(engine, batches, partial(sums_of, engine)):
        names = list(sums)
        total = total + torch.stack([value.double() for value in sums.values()])
    return dict(zip(names, sum_across_ranks(total, axis="data").tolist(), strict=True)) if names else {}


def main_metrics(metrics: Metrics) -> str:
    """The main ones of an evaluation for the console, each with its standard error where there is one."""
    shown = []
    for name in metrics:
        if metric(name).is_main:
            error = metrics.get(f"{name}_stderr")
            shown.append(f"{name} {metrics[name]:.4f}" + (f" +- {error:.4f}" if error is not None else ""))
    return ", ".join(shown)
