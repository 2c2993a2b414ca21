"""The speed of steps 1, 2 and DPO: what their optimiser steps read, and how long each phase took."""

from typing import Any

from torch import Tensor

from dschat.checkpoints.checkpoint import Checkpoints
from dschat.engines.model_work import ModelWork, Rows
from dschat.engines.speed import PHASES, SpeedReport, StepTimes, measured_peak
from dschat.engines.step import DeepSpeedEngine, LossAndMetrics
from dschat.supervised.batches import Loaders
from dschat.supervised.settings import SupervisedSettings

COUNTS = "rows_"
"""What stands before the names of `Rows` among a micro-batch's metrics."""


class Speed:
    """Measures the steps of one run."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        loaders: Loaders,
        settings: SupervisedSettings,
        checkpoints: Checkpoints,
    ) -> None:
        model = engine.module
        num_tokens = settings.batch.per_device_train_batch_size * int(loaders.longest_row)
        num_tokens = min(num_tokens, settings.batch.max_tokens_per_batch or num_tokens)
        peak = measured_peak(
            model.config, settings.run.dtype, num_tokens=num_tokens, choices=checkpoints.choices
        )
        self._work, self._report, self._times = ModelWork.of(model), SpeedReport(peak), StepTimes()
        self.end_of = self._times.end_of
        self.print_now_and_then = self._report.print_now_and_then

    def counting(self, loss_and_metrics: LossAndMetrics) -> LossAndMetrics:
        """The same function, which also counts what a micro-batch's rows hold."""

        def counted(batch: Any) -> dict[str, Tensor]:
            counts = Rows.counted(batch.tokens)
            return {**loss_and_metrics(batch), **{COUNTS + name: count for name, count in counts.items()}}

        return counted

    def figures(self, trained: dict[str, float]) -> dict[str, float]:
        """The metrics of speed of an optimiser step; its counts are taken out of `trained`.

        Seconds of evaluation and saving are of those since the step before.
        """
        rows = Rows(**{name: trained.pop(COUNTS + name) for name in ("tokens", "squares", "labels")})
        taken = self._times.take()
        seconds = {phase: taken.get(phase, 0.0) for phase in PHASES}
        return self._report.figures(tokens=rows.tokens, flops=self._work.training(rows), seconds=seconds)
