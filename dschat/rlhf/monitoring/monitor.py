"""What watches over PPO: evaluations, the guard that reads them, and the best actor."""

from dataclasses import dataclass
from typing import Any

from dschat.rlhf.monitoring.best_actor import OBJECTIVE, Exports
from dschat.rlhf.monitoring.evaluation import Evaluator
from dschat.rlhf.monitoring.guard import Figures, Guard


@dataclass
class TrainingMonitor:
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
