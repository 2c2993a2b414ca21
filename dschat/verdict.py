"""What the held-out pairs say of a reward model, in words. Numbers in, a sentence out."""

import math
from collections.abc import Sequence

from dschat.distributed import print_once
from dschat.evaluations import Evaluation

GOOD = "better than chance"
USEFUL = 0.6
"""A reward model that is right this often is of use to PPO: fewer pairs than can rule it out are too few."""
Z = 2.0
"""Standard errors on either side: 95 %."""
RISE = 1.05
"""An evaluation loss this many times the lowest one has risen."""


def tell_reward_verdict(evaluations: Sequence[Evaluation], exported: Evaluation | None) -> str:
    """`reward_verdict`, which rank 0 prints."""
    verdict = reward_verdict(evaluations, exported)
    print_once(f"{'' if is_good(verdict) else 'WARNING: '}verdict on the reward model: {verdict}")
    return verdict


def reward_verdict(evaluations: Sequence[Evaluation], exported: Evaluation | None) -> str:
    """The verdict on the `exported` one of the evaluations of a run, in order: words, a colon, the numbers.

    The words are `GOOD`, worse than chance, not better than chance or too few pairs to say, by the 95 %
    interval of the accuracy (Agresti and Coull 1998, which holds for few pairs and at 0 and 1 too), and
    overfitted where the evaluation loss is above the lowest of the run while the training loss has fallen.
    Without evaluation data: not evaluated; with a loss that is not finite: not finite.
    """
    if exported is None:
        return "not evaluated: no pairs were held out (--eval_fraction, --eval_data_path)"
    if not math.isfinite(exported.loss):
        return f"not finite: the evaluation loss is {exported.loss} at step {exported.step}"
    low, high = accuracy_interval(exported)
    words, numbers = [_against_chance(low, high)], [_accuracy(exported, low, high)]
    best = min((e for e in evaluations if math.isfinite(e.loss)), key=lambda evaluated: evaluated.loss)
    if _has_overfitted(exported, best, evaluations[0]):
        words.append("overfitted")
        numbers.append(f"{_rise(best, exported)} while the training loss fell to {exported.train_loss:.3f}")
    elif exported != evaluations[-1] and _has_overfitted(evaluations[-1], best, evaluations[0]):
        numbers.append(f"what was exported is not what the run ended with, as {_rise(best, evaluations[-1])}")
    return f"{', '.join(words)}: {'; '.join(numbers)}"


def is_good(verdict: str) -> bool:
    """Whether step 3 can rely on a reward model with this verdict."""
    return verdict.partition(":")[0] == GOOD


def accuracy_interval(evaluated: Evaluation) -> tuple[float, float]:
    """The 95 % interval of the accuracy.

    Pairs of one prompt are alike, so they count as so many independent ones as have this standard error.
    """
    found = evaluated.figures
    p, error = found["eval_accuracy"], found["eval_accuracy_stderr"]
    independent = p * (1 - p) / error**2 if error > 0 else float(found["eval_prompts"])
    n = min(max(independent, 1.0), float(found["eval_pairs"])) + Z**2
    centre = (p * (n - Z**2) + Z**2 / 2) / n
    half = Z * math.sqrt(centre * (1 - centre) / n)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _against_chance(low: float, high: float) -> str:
    if low > 0.5:
        return GOOD
    if high < 0.5:
        return "worse than chance"
    return "not better than chance" if high < USEFUL else "too few pairs to say"


def _accuracy(evaluated: Evaluation, low: float, high: float) -> str:
    found = evaluated.figures
    pairs, prompts = found["eval_pairs"], found["eval_prompts"]
    of_prompts = f" of {prompts} prompts" if prompts != pairs else ""
    return (
        f"{found['eval_accuracy']:.3f} +- {found['eval_accuracy_stderr']:.3f} of {pairs} held-out pairs"
        f"{of_prompts} in the right order (95 % interval {low:.2f} to {high:.2f}, chance 0.5)"
    )


def _has_overfitted(evaluated: Evaluation, best: Evaluation, first: Evaluation) -> bool:
    """Whether its loss is above the lowest before it, though what it was trained on is learned."""
    has_learned = evaluated.train_loss is not None and evaluated.train_loss < first.loss
    return has_learned and best.step < evaluated.step and evaluated.loss > RISE * best.loss


def _rise(best: Evaluation, later: Evaluation) -> str:
    when = f"step {best.step}" if best.step else "the start"
    return f"the evaluation loss rose from {best.loss:.3f} at {when} to {later.loss:.3f} at step {later.step}"
