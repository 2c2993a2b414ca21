"""The loop of step 3: PPO steps, what is logged of each, what watches over them, and what is kept."""

import time
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from dschat.arguments import RlhfArguments
from dschat.data.loaders import PromptLoader
from dschat.distributed import current_device, is_main_process
from dschat.metrics import MetricsLogger
from dschat.progress import Checkpoints
from dschat.rlhf.evaluation import Evaluator
from dschat.rlhf.exports import OBJECTIVE, Exports
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
        if self.evaluator and not evaluation and self.guard.stopped_by:
            evaluation = self.evaluator.figures()  # the run ends here, and its last figures are complete
        if evaluation:
            answers = self.evaluator.answers
            self.exports.offer(step, evaluation, answers, is_warned_of=self.guard.is_warning)
            messages = [evaluation_line(step, evaluation), *messages]
        return figures | evaluation, messages

    def state_dict(self) -> dict[str, Any]:
        """What all three remember, for JSON."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name, part in self._parts.items():
            if name in state:  # an evaluation may have been switched on since
                part.load_state_dict(state[name])

    @property
    def _parts(self) -> dict[str, Any]:
        parts = {"evaluator": self.evaluator, "guard": self.guard, "exports": self.exports}
        return {name: part for name, part in parts.items() if part is not None}


def evaluation_line(step: int, figures: Figures) -> str:
    """An evaluation for the console."""
    when = f"after PPO step {step}" if step else "before training"
    return (
        f"evaluation {when}: score {figures['eval_score']:.4g} +- {figures['eval_score_stderr']:.2g}, "
        f"KL {figures['eval_kl']:.3g}, score - beta KL {figures[OBJECTIVE]:.4g} ({OBJECTIVE}), "
        f"answers of {figures['eval_answer_length']:.4g} tokens, {figures['eval_eos_share']:.0%} ended"
    )


def train_ppo(
    trainer: DeepSpeedPPOTrainer,
    prompt_loader: PromptLoader,
    args: RlhfArguments,
    watch: Watch,
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
    if begun.step:
        trainer.load_state(begun.state["trainer"], begun)
        watch.load_state_dict(begun.state["watch"])
    done = trainer.num_ppo_steps_done
    metrics = MetricsLogger(
        args.run,
        total_steps=num_ppo_steps,
        description="PPO",
        is_main_process=is_main_process(),
        steps_done=done if begun.step else None,
    )
    start = time.perf_counter() - begun.state.get("seconds", 0.0)
    figures = begun.state["figures"] if begun.step else _watched(0, {}, watch, metrics)

    def save_if_due(*, is_last: bool = False) -> None:
        number = trainer.num_updates_passed
        if checkpoints.is_due(number, is_last=is_last):
            state = {"trainer": trainer.state_dict(), "watch": watch.state_dict(), "figures": figures}
            own, shared = trainer.tensors()
            metrics.flush()
            checkpoints.save(
                number,
                engines=trainer.engine.by_name,
                state=state | {"seconds": time.perf_counter() - start},
                tensors=own,
                shared_tensors=shared,
            )

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
            metrics.say(experience.examples(tokenizer, NUM_PRINTED_ANSWERS))
        save_if_due(is_last=step == num_ppo_steps or watch.guard.stopped_by is not None)
        if watch.guard.stopped_by:
            break
    metrics.close()
    return trainer.num_ppo_steps_done, figures, time.perf_counter() - start


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
