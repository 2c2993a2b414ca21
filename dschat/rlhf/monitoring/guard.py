"""The guard: sees in a run's metrics that PPO over-optimises its reward, says so, and ends the run in time.

Numbers in, messages out. The metrics are alike on all ranks, and so are the decisions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dschat.arguments import GuardArguments
from dschat.runs.registry import metric

Metrics = dict[str, float]

KL_PER_TOKEN, LEAST_MAX_KL = 0.25, 2.0
"""Without --max_kl and --kl_target the limit is so many nats per token of the first answers, and at least so
many an answer. It is wide: it ends a run that has run away, it does not find the best actor of one that has
not. Which KL is too much depends on the task and on the reward model."""
KL_TARGETS = 3
"""KL this many times --kl_target is out of the controller's hands."""
SMALLEST_EOS_SHARE = 0.2
"""A model that ends fewer of its first answers is not watched for ending fewer yet."""
STANDARD_ERRORS = 2
"""By so many a second reward model's score must have fallen."""
NUM_NAMED = 3
"""So many metrics that are not finite are named: soon after the first all are."""
MAY_OVERFLOW = ("actor_grad_norm", "critic_grad_norm")
"""Under fp16 a gradient may overflow: that step is skipped and the loss scale lowered."""


@dataclass(frozen=True)
class Sighting:
    """What is wrong, with its numbers, and what usually helps."""

    seen: str
    remedy: str


class Guard:
    """Reads each PPO step's metrics; `stopped_by` names the check that ended the run, `reason` says why.

    A check compares with the first metrics of the run, of training and of evaluation each with their own.
    """

    def __init__(self, args: GuardArguments, *, kl_target: float | None = None) -> None:
        self._args = args
        self._kl_target = kl_target
        self._initial: Metrics = {}
        self._streaks: dict[str, int] = {}
        self.stopped_by: str | None = None
        self.reason: str | None = None
        self._checks: dict[str, Callable[[Metrics], Sighting | None]] = {
            "non-finite": self._non_finite,
            "kl": self._kl,
            "entropy": self._entropy,
            "length": self._length,
            "end token": self._end_token,
            "second reward model": self._second_reward_model,
        }

    @property
    def is_warning(self) -> bool:
        """Whether anything was wrong in the last metrics."""
        return bool(self._streaks)

    @property
    def wants_evaluation(self) -> bool:
        """Whether only an evaluation can tell if the run is to stop: each PPO step needs one then."""
        return "second reward model" in self._streaks and self._args.patience > 0

    def observe(self, step: int, metrics: Metrics) -> list[str]:
        """Take in the metrics after a PPO step (0: before the first), those with eval_ where there are some.

        Returns what is to be said. After --patience steps in a row of one sighting the run is to stop.
        """
        for name, value in metrics.items():
            if math.isfinite(value):
                self._initial.setdefault(name, value)
        messages = []
        for name, check in self._checks.items():
            if name == "second reward model" and "eval_guard_score" not in metrics:
                continue
            sighting = check(metrics)
            if sighting:
                messages += self._count(step, name, sighting)
            elif self._streaks.pop(name, 0):
                messages.append(f"guard: PPO step {step}: {name} is back within its limit.")
        return messages

    def _count(self, step: int, name: str, sighting: Sighting) -> list[str]:
        self._streaks[name] = count = self._streaks.get(name, 0) + 1
        patience = self._args.patience
        if count >= patience > 0 and self.stopped_by is None:
            self.stopped_by, self.reason = name, sighting.seen
            return [
                f"guard: the run stops after PPO step {step}: for {count} PPO steps in a row (--patience) "
                f"{sighting.seen}. What usually helps: {sighting.remedy}."
            ]
        if count > 1:
            return []
        consequence = f"after {patience} PPO steps in a row of it the run stops" if patience else "it goes on"
        return [
            f"guard: PPO step {step}: {sighting.seen}. What usually helps: {sighting.remedy}. "
            f"(--patience {patience}: {consequence}.)"
        ]

    def _either(self, metrics: Metrics, name: str, is_bad: Callable[[float, float], bool]) -> list[Metrics]:
        """Value and first value of the figure, in training and in evaluation, where it is bad."""
        names = [n for n in (name, f"eval_{name}") if n in metrics and n in self._initial]
        return [
            {"now": metrics[n], "first": self._initial[n]}
            for n in names
            if is_bad(metrics[n], self._initial[n])
        ]

    def _non_finite(self, metrics: Metrics) -> Sighting | None:
        names = [n for n, v in metrics.items() if not math.isfinite(v) and n not in MAY_OVERFLOW]
        if not names:
            return None
        more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
        return Sighting(
            f"{', '.join(names[:NUM_NAMED])}{more} {'is' if len(names) == 1 else 'are'} not finite",
            "lower --actor_learning_rate and --critic_learning_rate, use --dtype bf16 or fp32 in place of "
            "fp16, and look at the last finite steps in metrics.jsonl",
        )

    @property
    def max_kl(self) -> float | None:
        """The limit of KL in nats per answer, None before there is an answer to tell it by."""
        length = self._initial.get("eval_answer_length", self._initial.get("answer_length"))
        if self._args.max_kl is not None:
            return self._args.max_kl
        if self._kl_target is not None:
            return KL_TARGETS * self._kl_target
        return None if length is None else max(KL_PER_TOKEN * length, LEAST_MAX_KL)

    def _kl(self, metrics: Metrics) -> Sighting | None:
        limit = self.max_kl
        bad = self._either(metrics, "kl", lambda now, first: limit is not None and now > limit)
        if not bad:
            return None
        return Sighting(
            f"KL to the reference is {bad[-1]['now']:.3g} nats an answer, above --max_kl {limit:.3g}",
            metric("kl").remedy,
        )

    def _entropy(self, metrics: Metrics) -> Sighting | None:
        share = self._args.min_entropy_ratio
        bad = self._either(metrics, "entropy", lambda now, first: now < share * first)
        if not bad:
            return None
        return Sighting(
            f"entropy has collapsed to {bad[-1]['now']:.3g} nats a token from {bad[-1]['first']:.3g} "
            f"(--min_entropy_ratio {share:g})",
            metric("entropy").remedy,
        )

    def _length(self, metrics: Metrics) -> Sighting | None:
        ratio = self._args.max_length_ratio
        bad = self._either(metrics, "answer_length", lambda now, first: now > ratio * first)
        if not bad:
            return None
        return Sighting(
            f"answers have grown to {bad[-1]['now']:.3g} tokens from {bad[-1]['first']:.3g} "
            f"(--max_length_ratio {ratio:g}), so the reward may pay for length",
            metric("answer_length").remedy,
        )

    def _end_token(self, metrics: Metrics) -> Sighting | None:
        ratio = self._args.min_eos_ratio
        bad = self._either(
            metrics, "eos_share", lambda now, first: first >= SMALLEST_EOS_SHARE and now < ratio * first
        )
        if not bad:
            return None
        return Sighting(
            f"only {bad[-1]['now']:.1%} of the answers end before the length limit, {bad[-1]['first']:.1%} "
            f"did at first (--min_eos_ratio {ratio:g}), so the reward may pay for length",
            metric("eos_share").remedy,
        )

    def _second_reward_model(self, metrics: Metrics) -> Sighting | None:
        first, score, guard = self._initial, metrics["eval_score"], metrics["eval_guard_score"]
        if not {"eval_score", "eval_guard_score"} <= first.keys():
            return None
        error = math.hypot(first["eval_guard_score_stderr"], metrics["eval_guard_score_stderr"])
        if score <= first["eval_score"] or guard >= first["eval_guard_score"] - STANDARD_ERRORS * error:
            return None
        return Sighting(
            f"the score has risen to {score:.4g} from {first['eval_score']:.4g}, while the second reward "
            f"model's has fallen to {guard:.4g} from {first['eval_guard_score']:.4g} (standard error of the "
            f"difference {error:.2g})",
            metric("eval_guard_score").remedy,
        )

    def verdict(self) -> dict[str, str]:
        """What a summary tells of a run that the guard ended; nothing of another."""
        if self.stopped_by is None or self.reason is None:  # they are set together
            return {}
        return {"stopped_by": self.stopped_by, "stop_reason": self.reason}

    def state_dict(self) -> dict[str, Any]:
        """All that the guard remembers, for JSON."""
        return {
            "initial": dict(self._initial),
            "streaks": dict(self._streaks),
            "stopped_by": self.stopped_by,
            "reason": self.reason,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._initial, self._streaks = dict(state["initial"]), dict(state["streaks"])
        self.stopped_by, self.reason = state["stopped_by"], state["reason"]
