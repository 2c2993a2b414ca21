"""The loop of step 3: PPO steps, what is logged of each, what watches over them, and what is kept."""

import time

from transformers import PreTrainedTokenizerBase

from dschat.arguments import RlhfArguments
from dschat.checkpoints.checkpoint import Checkpoints
from dschat.console import messages
from dschat.data.loaders import PromptLoader
from dschat.distributed.device import current_device
from dschat.distributed.mesh import is_main_process
from dschat.rlhf.monitoring.guard import Figures
from dschat.rlhf.monitoring.monitor import TrainingMonitor
from dschat.rlhf.ppo_trainer import DeepSpeedPPOTrainer
from dschat.runs.metrics import MetricsLogger

SHOWN = ("score", "kl", "answer_length", "value_loss")


NUM_PRINTED_ANSWERS = 3


def train_ppo(
    trainer: DeepSpeedPPOTrainer,
    prompt_loader: PromptLoader,
    args: RlhfArguments,
    watch: TrainingMonitor,
    *,
    num_ppo_steps: int,
    tokenizer: PreTrainedTokenizerBase,
    checkpoints: Checkpoints,
) -> tuple[int, Figures, float]:
    """Train for so many PPO steps, or until the guard ends the run; go on from a checkpoint if there is one.

    Returns how many PPO steps are done, the figures of the last, and the seconds of all. Every rank must
    call it.
    """
    begun = checkpoints.load(trainer.engine.by_name)
    begun.restore({**trainer.parts, "watch": watch})
    done = trainer.num_ppo_steps_done
    metrics = MetricsLogger(
        args.run,
        total_steps=num_ppo_steps,
        description="PPO",
        is_main_process=is_main_process(),
        steps_done=done if begun.step else None,
    )
    start = time.perf_counter() - begun.values.get("seconds", 0.0)
    figures = begun.values["figures"] if begun.step else _watched(0, {}, watch, metrics)

    def save_if_due(*, is_last: bool = False) -> None:
        number = trainer.num_updates_passed
        if checkpoints.is_due(number, is_last=is_last):
            parts = {**trainer.parts_to_keep, "watch": watch, "figures": figures}
            parts["seconds"] = time.perf_counter() - start
            metrics.flush()
            checkpoints.save(number, engines=trainer.engine.by_name, parts=parts)

    steps = range(done + 1, num_ppo_steps + 1) if not watch.guard.stopped_by else ()
    for step, prompts in zip(steps, prompt_loader.steps_after(done), strict=False):
        experience = trainer.unfinished
        if experience is None:
            experience = trainer.generate_experience([batch.to(current_device()) for batch in prompts])
        for minibatch in trainer.minibatches():
            trainer.train_rlhf(minibatch)
            if trainer.unfinished:
                save_if_due()
        figures = _watched(step, trainer.metrics(), watch, metrics, is_last=step == num_ppo_steps)
        metrics.advance()
        if args.rollout.print_answers and step % args.rollout.print_answers_interval == 0:
            messages.info(experience.examples(tokenizer, NUM_PRINTED_ANSWERS))
        save_if_due(is_last=step == num_ppo_steps or watch.guard.stopped_by is not None)
        if watch.guard.stopped_by:
            break
    metrics.close()
    return trainer.num_ppo_steps_done, figures, time.perf_counter() - start


def _watched(
    step: int, figures: Figures, watch: TrainingMonitor, metrics: MetricsLogger, *, is_last: bool = False
) -> Figures:
    """The figures after a PPO step with those of an evaluation, logged, and what the guard says printed."""
    values, warnings = watch.after(step, figures, is_last=is_last)
    if values:
        metrics.log(step, show=SHOWN, **values)
    for warning in warnings:
        messages.info(warning)
    return values
