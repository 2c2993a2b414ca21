"""What the held-out pairs say of a reward model, in words. Numbers in, a sentence out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dschat.reports.reward_model import GOOD, verdict_words
from dschat.reports.statistics import Estimate, Z, cautious_interval

RISE = 1.05
"""An evaluation loss this many times the lowest one has risen."""


@dataclass(frozen=True)
class Evaluation:
    """What was found after so many optimiser steps."""

    step: int
    figures: dict[str, float]
    loss: float
    """eval_loss over the rows that all evaluations of the run have in common."""
    train_loss: float | None
    """The mean over the optimiser steps since the evaluation before; None before training."""


def reward_verdict(evaluations: Sequence[Evaluation]) -> str:
    """The verdict on a reward model by the evaluations up to its own, in order: words, a colon, the numbers.

    The words are those of `verdict_words`, as in the report on the reward model, and overfitted where the
    evaluation loss is above the lowest before while the training loss has fallen. Without evaluation data:
    not evaluated; with a loss that is not finite: not finite.
    """
    if not evaluations:
        return "not evaluated: no pairs were held out (--eval_fraction, --eval_data_path)"
    first, last = evaluations[0], evaluations[-1]
    if not math.isfinite(last.loss):
        return f"not finite: the evaluation loss is {last.loss} at step {last.step}"
    low, high = accuracy_interval(last)
    gain, overconfidence = (
        _estimate(last, f"eval_{name}") for name in ("gain_over_length", "overconfidence")
    )
    words = verdict_words(Estimate(last.figures["eval_accuracy"], low, high), gain, overconfidence)
    numbers = [_accuracy(last, low, high)]
    if any("length" in word for word in words):
        numbers.append(f"{gain.shown('+.3f')} against the rule of length")
    if "overconfident" in words:
        numbers.append(f"the mean probability is {overconfidence.shown('+.3f')} above that")
    best = min((e for e in evaluations if math.isfinite(e.loss)), key=lambda evaluation: evaluation.loss)
    if last.train_loss is not None and last.train_loss < first.loss and last.loss > RISE * best.loss:
        words.append("overfitted")
        when = f"step {best.step}" if best.step else "the start"
        numbers.append(
            f"the evaluation loss rose from {best.loss:.3f} at {when} "
            f"to {last.loss:.3f} at step {last.step} while the training loss fell to {last.train_loss:.3f}"
        )
    return f"{', '.join(words)}: {'; '.join(numbers)}"


def is_good(verdict: str) -> bool:
    """Whether step 3 can rely on a reward model with this verdict."""
    return verdict.partition(":")[0] == GOOD


def accuracy_interval(evaluated: Evaluation) -> tuple[float, float]:
    """The 95 % interval of the accuracy.

    Pairs of one prompt are alike, so they count as so many independent ones as have this standard error.
    """
    found = evaluated.figures
    return cautious_interval(
        found["eval_accuracy"], found["eval_accuracy_stderr"], found["eval_pairs"], found["eval_prompts"]
    )


def _estimate(evaluated: Evaluation, name: str) -> Estimate:
    value, error = evaluated.figures[name], Z * evaluated.figures[f"{name}_stderr"]
    return Estimate(value, value - error, value + error)


def _accuracy(evaluated: Evaluation, low: float, high: float) -> str:
    found = evaluated.figures
    pairs, prompts = found["eval_pairs"], found["eval_prompts"]
    of_prompts = f" of {prompts} prompts" if prompts != pairs else ""
    return (
        f"{found['eval_accuracy']:.3f} +- {found['eval_accuracy_stderr']:.3f} of {pairs} held-out pairs"
        f"{of_prompts} in the right order (95 % interval {low:.2f} to {high:.2f}, chance 0.5)"
    )
