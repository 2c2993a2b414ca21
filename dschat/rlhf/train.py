"""The loop of step 3: PPO steps, what is logged of each, what watches over them, and what is kept."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from dschat.arguments import RlhfArguments, RolloutArguments, RunDescription
from dschat.checkpoints.checkpoint import Checkpoints
from dschat.console import messages
from dschat.data.loaders import PromptLoader
from dschat.data.preparation import SplitData
from dschat.distributed.device import current_device
from dschat.distributed.mesh import is_main_process
from dschat.engines.profile import StepProfiler
from dschat.planning.run_plan import RunPlan
from dschat.rlhf.monitoring.evaluation import Evaluator
from dschat.rlhf.monitoring.monitor import TrainingMonitor
from dschat.rlhf.ppo_trainer import Metrics, PPOTrainer
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.rlhf.samples import distributions, samples_of, samples_table
from dschat.rlhf.speed import PpoSpeed
from dschat.rlhf.tokenizers import RlhfTokenizers
from dschat.runs.metrics import MetricsLogger


@dataclass(frozen=True)
class Assembly:
    """The parts of a run that is ready for its first PPO step, or to go on from a checkpoint."""

    data: SplitData
    tokenizers: RlhfTokenizers
    prompts: PromptLoader
    num_ppo_steps: int
    engine: DeepSpeedRLHFEngine
    trainer_of: Callable[[RlhfArguments], PPOTrainer]
    evaluator_of: Callable[[RlhfArguments], Evaluator | None]
    checkpoints: Checkpoints
    plan: RunPlan


def train_ppo(
    trainer: PPOTrainer,
    prompt_loader: PromptLoader,
    monitor: TrainingMonitor,
    *,
    description: RunDescription,
    rollout: RolloutArguments,
    speed: PpoSpeed,
    num_ppo_steps: int,
    tokenizer: PreTrainedTokenizerBase,
    checkpoints: Checkpoints,
) -> tuple[int, dict[str, Any], float]:
    """Train for so many PPO steps, or until the guard ends the run; go on from a checkpoint if there is one.

    Exports the models at the end. Returns how many PPO steps are done, the metrics of the last with what the
    exports tell of theirs, and the seconds of all PPO steps. Every rank must call it.
    """
    restored = checkpoints.load(trainer.engine.by_name)
    restored.restore({**trainer.parts, "watch": monitor})
    done = trainer.num_ppo_steps_done
    logger = MetricsLogger(
        description,
        total_steps=num_ppo_steps,
        title="PPO",
        is_main_process=is_main_process(),
        steps_done=done if restored.step else None,
    )
    monitor.exports.best.log = logger.log
    start = time.perf_counter() - restored.values.get("seconds", 0.0)
    metrics = restored.values["figures"] if restored.step else _monitored(0, {}, monitor, logger)

    def save_if_due(*, is_last: bool = False) -> None:
        number = trainer.num_updates
        if checkpoints.is_due(number, is_last=is_last):
            parts = {**trainer.parts_to_keep, "watch": monitor, "figures": metrics}
            parts["seconds"] = time.perf_counter() - start
            logger.flush()
            checkpoints.save(number, engines=trainer.engine.by_name, parts=parts)

    def after_update() -> None:
        if trainer.is_inside_ppo_step:  # else it is saved with the metrics of the PPO step
            save_if_due()

    profiler = StepProfiler(description.run)
    profiler.after_step(done)
    steps = range(done + 1, num_ppo_steps + 1) if not monitor.guard.stopped_by else ()
    for step, prompts in zip(steps, prompt_loader.steps_after(done), strict=False):
        batches = [batch.to(current_device()) for batch in prompts]
        metrics_of_step = trainer.step(batches, ppo_step=step - 1, after_update=after_update)
        metrics_of_step |= speed.figures(metrics_of_step)
        metrics = _monitored(step, metrics_of_step, monitor, logger, is_last=step == num_ppo_steps)
        logger.advance()
        _show(step, trainer, logger, rollout, tokenizer)
        is_last = step == num_ppo_steps or monitor.guard.stopped_by is not None
        with speed.saving():
            save_if_due(is_last=is_last)
        speed.print_now_and_then(step, is_last=is_last)
        profiler.after_step(step, metrics)
        if monitor.guard.stopped_by:
            break
    profiler.close(trainer.num_ppo_steps_done)
    seconds = time.perf_counter() - start
    exported = monitor.exports.finish(trainer.num_ppo_steps_done, metrics)
    logger.close()
    return trainer.num_ppo_steps_done, metrics | exported, seconds


def _show(
    step: int,
    trainer: PPOTrainer,
    logger: MetricsLogger,
    rollout: RolloutArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Histograms of a PPO step, and samples where they are due."""
    experience = trainer.experience
    assert experience is not None, "a PPO step has experience"
    if not is_main_process():
        return
    logger.histograms(step, distributions(experience))
    if step % rollout.print_answers_interval == 0:
        rows = samples_of(experience, tokenizer)
        logger.samples(step, rows)
        if rollout.print_answers:
            messages.info(samples_table(step, rows))


def _monitored(
    step: int, metrics: Metrics, monitor: TrainingMonitor, logger: MetricsLogger, *, is_last: bool = False
) -> Metrics:
    """The metrics after a PPO step with those of an evaluation, logged, and the guard's warnings printed."""
    values, lines = monitor.after_step(step, metrics, is_last=is_last)
    if values:
        logger.log(step, values)
    for line in lines:
        messages.info(line)
    return values
