"""What steps 1 and 2 and DPO share: epochs over examples, with an evaluation before, during and after."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

from dschat.checkpoints.checkpoint import Checkpoints
from dschat.console import messages
from dschat.distributed.mesh import is_main_process
from dschat.distributed.random_state import seed_ranks_apart
from dschat.engines.profile import StepProfiler
from dschat.engines.skipped_steps import SkippedSteps
from dschat.engines.step import DeepSpeedEngine, gradient_norm, learning_rate, train_step
from dschat.runs.metrics import MetricsLogger
from dschat.supervised.batches import Loaders
from dschat.supervised.chance import ChanceWatch
from dschat.supervised.evaluations import Evaluate, Evaluations
from dschat.supervised.exports import ModelExports, VerdictOf
from dschat.supervised.pair_report import PairReport
from dschat.supervised.settings import SupervisedSettings
from dschat.supervised.speed import Speed

ENGINE = "model"
"""The engine's name in checkpoints."""


@dataclass(frozen=True)
class Objective:
    """What a step minimises, and what it measures of a model."""

    title: str
    """What stands beside the progress bar."""
    loss_and_metrics: Callable[[DeepSpeedEngine, Any], dict[str, Tensor]]
    """A micro-batch's shares, as in `engines.step.LossAndMetrics`."""
    evaluate: Evaluate
    """The metrics of an evaluation, "eval_loss" among them; none where there are no evaluation data."""
    verdict_of: VerdictOf | None = None
    """What the evaluations up to that of a model tell of it, in words."""
    report: PairReport | None = None
    """What is told of a reward model with its export; `evaluate` gives it the scores."""
    print_loss: bool = False
    """Whether the loss of every optimiser step is printed."""


def train_epochs(
    engine: DeepSpeedEngine,
    loaders: Loaders,
    settings: SupervisedSettings,
    objective: Objective,
    checkpoints: Checkpoints,
    exports: ModelExports,
) -> None:
    """Train, evaluate, log, save, export; go on from a checkpoint where there is one."""
    steps_per_epoch = loaders.train.steps_per_epoch
    num_steps = loaders.train.num_steps_of(settings.optimizer.num_train_epochs)
    seed_ranks_apart(settings.run.seed)
    restored = checkpoints.load({ENGINE: engine})
    metrics = MetricsLogger(
        settings.description,
        total_steps=num_steps,
        title=objective.title,
        is_main_process=is_main_process(),
        steps_done=restored.step or None,
    )
    exports.best.log = metrics.log
    interval = settings.batch.eval_interval
    short = loaders.short_evaluation if interval else None
    evaluations = Evaluations(engine, objective.evaluate, metrics, whole=loaders.evaluation, short=short)
    skipped = SkippedSteps(settings.run)
    start = time.perf_counter() - restored.values.get("seconds", 0.0)
    parts: dict[str, Stateful] = {"evaluations": evaluations, "exports": exports, "skipped": skipped}
    parts["chance"] = chance = ChanceWatch(settings, loaders.data, is_on=objective.report is not None)
    restored.restore(parts)
    if not restored.step:
        evaluations.make(0, "before training")
    speed = Speed(engine, loaders, settings, checkpoints)
    exports.best.end_of = speed.end_of
    loss_and_metrics = speed.counting(partial(objective.loss_and_metrics, engine))
    profiler = StepProfiler(settings.run)
    profiler.after_step(restored.step)
    numbers = range(restored.step + 1, num_steps + 1)
    for step, optimizer_step in zip(numbers, loaders.train.steps_after(restored.step), strict=False):
        speed.end_of("data")
        trained = train_step(engine, optimizer_step.micro_batches, loss_and_metrics, end_of=speed.end_of)
        figures = speed.figures(trained)
        metrics.log(step, {**trained, **_of_update(engine, skipped, step), **figures})
        metrics.advance()
        evaluations.take_in(trained["loss"])
        chance.take_in(step, trained)
        if objective.print_loss:
            messages.info(f"step {step}: loss {trained['loss']:.4f}")
        if step % steps_per_epoch == 0 or step == num_steps:
            epochs = min(step / steps_per_epoch, settings.optimizer.num_train_epochs)
            evaluations.make(step, f"epoch {epochs:g}")
        elif interval and step % interval == 0:
            evaluations.make(step, f"step {step}", is_short=True)
        speed.end_of("evaluation")
        if evaluations.last_step == step:
            exports.offer(evaluations.all)
        if checkpoints.is_due(step, is_last=step == num_steps):
            metrics.flush()
            seconds = time.perf_counter() - start
            checkpoints.save(step, engines={ENGINE: engine}, parts={**parts, "seconds": seconds})
        profiler.after_step(step, figures)
        speed.end_of("saving")
        speed.print_now_and_then(step, is_last=step == num_steps)
    if objective.report is not None and not objective.report.has_scores:
        evaluations.repeat()
    profiler.close(num_steps)
    exports.finish(num_steps, evaluations.all, time.perf_counter() - start)
    metrics.close()


def _of_update(engine: DeepSpeedEngine, skipped: SkippedSteps, step: int) -> dict[str, float]:
    """What the engine says of the optimiser step that it has taken, or skipped."""
    return {
        "learning_rate": learning_rate(engine),
        "grad_norm": gradient_norm(engine),
        "skipped_steps": skipped.note(engine, step=step),
    }
