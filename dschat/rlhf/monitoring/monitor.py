"""What watches over PPO: evaluations, the guard that reads them, and the best actor."""

from dataclasses import dataclass
from typing import Any

from dschat.rlhf.monitoring.best_actor import OBJECTIVE, Exports
from dschat.rlhf.monitoring.evaluation import Evaluator
from dschat.rlhf.monitoring.guard import Guard, Metrics


@dataclass
class TrainingMonitor:
    """Evaluations, the guard that reads them beside the metrics of training, and the best actor."""

    evaluator: Evaluator | None
    guard: Guard
    exports: Exports
    interval: int
    """PPO steps between evaluations."""

    def after_step(self, step: int, metrics: Metrics, *, is_last: bool = False) -> tuple[Metrics, list[str]]:
        """The metrics after a PPO step, with those of an evaluation where one is due, and lines to print.

        Step 0 is before the first. An actor of which the guard warns is no best actor. Every rank must call
        it.
        """
        is_due = is_last or self.guard.wants_evaluation or step % max(self.interval, 1) == 0
        evaluation = self._evaluate(metrics) if is_due else {}
        lines = self.guard.observe(step, metrics | evaluation)
        if not evaluation and self.guard.stopped_by:
            evaluation = self._evaluate(metrics)  # the run ends here, and its last metrics are complete
        if evaluation and self.evaluator:
            answers = self.evaluator.answers
            self.exports.offer(step, evaluation, answers, is_warned_of=self.guard.is_warning)
            lines = [evaluation_line(step, evaluation), *lines]
        return metrics | evaluation, lines

    def _evaluate(self, metrics: Metrics) -> Metrics:
        """An evaluation with the beta of the PPO step; nothing without an evaluator."""
        return self.evaluator.evaluate(kl_coef=metrics.get("kl_coef")) if self.evaluator else {}

    def state_dict(self) -> dict[str, Any]:
        """The states of evaluator, guard and exports, for JSON."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        for name, part in self._parts.items():
            if name in state_dict:  # an evaluation may have been switched on since
                part.load_state_dict(state_dict[name])

    @property
    def _parts(self) -> dict[str, Any]:
        parts = {"evaluator": self.evaluator, "guard": self.guard, "exports": self.exports}
        return {name: part for name, part in parts.items() if part is not None}


def evaluation_line(step: int, metrics: Metrics) -> str:
    """An evaluation for the console."""
    when = f"after PPO step {step}" if step else "before training"
    return (
        f"evaluation {when}: score {metrics['eval_score']:.4g} +- {metrics['eval_score_stderr']:.2g}, "
        f"KL {metrics['eval_kl']:.3g}, score - beta KL {metrics[OBJECTIVE]:.4g} ({OBJECTIVE}), "
        f"answers of {metrics['eval_answer_length']:.4g} tokens, {metrics['eval_eos_share']:.0%} ended"
    )
