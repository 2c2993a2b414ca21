"""The loop of step 3: PPO steps, what is logged of each, and what watches over them."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dschat.arguments import RlhfArguments
from dschat.data.loaders import PromptLoader
from dschat.distributed import current_device
from dschat.metrics import MetricsLogger
from dschat.rlhf.evaluation import Evaluator
from dschat.rlhf.exports import Exports
from dschat.rlhf.guard import Figures, Guard
from dschat.rlhf.ppo_trainer import DeepSpeedPPOTrainer

SHOWN = ("score", "kl", "answer_length", "value_loss")
NUM_PRINTED_ANSWERS = 3


@dataclass
class Watch:
    """Evaluations, the guard that reads them beside the figures of training, and the best actor."""

    evaluator: Evaluator | None
    guard: Guard
    exports: Exports
    interval: int
    """PPO steps between evaluations."""

    def after(self, step: int, figures: Figures, *, is_last: bool = False) -> tuple[Figures, list[str]]:
        """The figures after a PPO step, an evaluation's among them where one is due, and what is to be said.

        Step 0 is before the first. What the guard warns of is no best actor. Every rank must call it.
        """
        is_due = is_last or self.guard.wants_evaluation or step % max(self.interval, 1) == 0
        evaluation = self.evaluator.figures() if self.evaluator and is_due else {}
        messages = self.guard.observe(step, figures | evaluation)
        if evaluation and not self.guard.is_warning:
            self.exports.offer(step, evaluation)
        if self.evaluator and not evaluation and self.guard.stopped_by:
            evaluation = self.evaluator.figures()  # the run ends here, and its last figures are complete
        return figures | evaluation, messages


def train_ppo(
    trainer: DeepSpeedPPOTrainer,
    prompt_loader: PromptLoader,
    metrics: MetricsLogger,
    args: RlhfArguments,
    watch: Watch,
    *,
    num_ppo_steps: int,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[int, Figures]:
    """Train for so many PPO steps, or until the guard ends the run. Every rank must call it.

    Returns how many were done and the figures of the last.
    """
    device, step = current_device(), 0
    values = _watched(0, {}, watch, metrics)
    for step, prompts in zip(range(1, num_ppo_steps + 1), prompt_loader, strict=False):
        experience = trainer.generate_experience([batch.to(device) for batch in prompts])
        for epoch in range(args.ppo.ppo_epochs):
            for minibatch in experience.minibatches(epoch):
                trainer.train_rlhf(minibatch)
        values = _watched(step, trainer.metrics(), watch, metrics, is_last=step == num_ppo_steps)
        metrics.advance()
        if args.rollout.print_answers and step % args.rollout.print_answers_interval == 0:
            metrics.say(experience.examples(tokenizer, NUM_PRINTED_ANSWERS))
        if watch.guard.stopped_by:
            break
    return step, values


def _watched(
    step: int, figures: Figures, watch: Watch, metrics: MetricsLogger, *, is_last: bool = False
) -> Figures:
    """The figures after a PPO step with those of an evaluation, logged, and what the guard says printed."""
    values, messages = watch.after(step, figures, is_last=is_last)
    if values:
        metrics.log(step, show=SHOWN, **values)
    for message in messages:
        metrics.say(message)
    return values
