"""The report on a reward model: whether its scores can be trusted, in words, numbers and plots.

Scores in, JSON and a page out. Which pair of answers is right is what the labels say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from dschat.reports.page import Block, Level, Plot, Plots, Samples, Section, Table, Text, Verdict, page
from dschat.reports.plots import SERIES, plot
from dschat.reports.statistics import (
    Estimate,
    agresti_coull,
    bootstrapped,
    calibration_curve,
    calibration_error,
    correlation,
    lapse_rate,
    mean,
    rate,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GOOD = "good"
USEFUL = 0.6
"""A reward model that is right this often is of use to PPO: fewer pairs than can rule it out are too few."""
USEFUL_GAIN = 0.05
"""And so much more often than the rule of length."""
OVERCONFIDENCE = 0.02
"""A mean probability by so much above the accuracy is no cause to speak of."""
NUM_PLOTTED = 20
"""With fewer pairs there are no plots."""
NUM_MISTAKES = 10
EDGES = (1, 10, 50, 200)
"""Limits of the buckets of how many tokens the chosen answer is longer, on either side of 0."""
LEVELS: dict[str, Level] = {"good": "good", "too few pairs": "warning", "overconfident": "warning"}

NOISE = (
    "Share of the labels that are the other way round whatever the scores say: the lapse rate e of "
    "P(label) = e + (1 - 2e) sigmoid(b x difference of the scores), fitted by maximum likelihood with "
    "the scale b free (Wichmann and Hill 2001, https://doi.org/10.3758/BF03194544), with the interval of "
    "the likelihood ratio over as many pairs as are independent. It takes mistakes that the model is sure "
    "of for wrong labels; a weak model, whose scores lie close together, leaves the interval wide."
)


@dataclass(frozen=True, kw_only=True)
class ScoredPairs:
    """N held-out pairs with their scores, and what is known of them; arrays [N]."""

    chosen: np.ndarray
    """Scores of the better answers by the labels,"""
    rejected: np.ndarray
    """and of the worse ones."""
    chosen_lengths: np.ndarray
    """Tokens of the answers, their end tokens included."""
    rejected_lengths: np.ndarray
    prompts: np.ndarray
    """A number that the pairs of one prompt have in common."""
    sources: np.ndarray
    """The number of each pair's data set in `source_names`."""
    source_names: Sequence[str]
    margins: np.ndarray
    """By how much the chosen answer is better, where the data say that; else 0."""

    @property
    def lead(self) -> np.ndarray:
        """By how much the chosen answer's score is higher."""
        return self.chosen - self.rejected

    @property
    def right(self) -> np.ndarray:
        """1 where the chosen answer's score is higher, 1/2 where they are equal, else 0."""
        return _order(self.lead)

    @property
    def longer(self) -> np.ndarray:
        """The same of the rule that the longer answer is the better one."""
        return _order(self.chosen_lengths - self.rejected_lengths)

    @property
    def confidence(self) -> np.ndarray:
        """The probability that the model gives to the answer with the higher score (Bradley and Terry)."""
        return 1 / (1 + np.exp(-np.abs(self.lead)))


def _order(difference: np.ndarray) -> np.ndarray:
    return (1 + np.sign(difference)) / 2


def verdict_words(accuracy: Estimate, gain: Estimate, overconfidence: Estimate) -> list[str]:
    """The verdict, by tests at 5 %: each word needs an interval that lies beyond its bound.

    `gain` is that of the accuracy over the rule of length, `overconfidence` the mean probability less the
    accuracy. [`GOOD`] where nothing is wrong.
    """
    if accuracy.high < 0.5:
        return ["worse than chance"]
    if not accuracy.low > 0.5:
        return ["no better than chance" if accuracy.high < USEFUL else "too few pairs to say"]
    words = []
    if not gain.low > 0:
        is_sure = gain.value <= 0 or gain.high < USEFUL_GAIN
        words.append("no better than length" if is_sure else "too few pairs to tell it from length")
    if overconfidence.low > OVERCONFIDENCE:
        words.append("overconfident")
    return words or [GOOD]


def level_of(verdict: str) -> Level:
    """The level of a verdict that begins with words of `verdict_words`."""
    return next((level for name, level in LEVELS.items() if verdict.startswith(name)), "bad")


def beyond_accuracy(pairs: ScoredPairs) -> tuple[Estimate, Estimate, Estimate]:
    """How often the longer answer is the better one, the gain over the rule of length, the overconfidence."""
    right, longer = pairs.right, pairs.longer
    of_length = rate(longer, pairs.prompts)
    rule = longer if of_length.value >= 0.5 else 1 - longer
    return of_length, mean(right - rule, pairs.prompts), mean(pairs.confidence - right, pairs.prompts)


def reward_report(pairs: ScoredPairs) -> dict[str, Any]:
    """All numbers of the report and its verdict, for JSON; what is not known is None."""
    right, prompts = pairs.right, pairs.prompts
    accuracy = agresti_coull(right, prompts)
    of_length, gain, overconfidence = beyond_accuracy(pairs)
    words = verdict_words(accuracy, gain, overconfidence)
    both, lengths = (
        np.concatenate(parts)
        for parts in ((pairs.chosen, pairs.rejected), (pairs.chosen_lengths, pairs.rejected_lengths))
    )
    twice = np.tile(prompts, 2)
    report = {
        "verdict": ", ".join(words),
        "reason": _reason(pairs, accuracy, of_length, gain, overconfidence),
        "pairs": len(right),
        "prompts": len(np.unique(prompts)),
        "accuracy": accuracy,
        "longer_answer_accuracy": of_length,
        "gain_over_length": gain,
        "overconfidence": overconfidence,
        "calibration_error": bootstrapped(calibration_error, (pairs.confidence, right), prompts),
        "length_correlation": bootstrapped(correlation, (both, lengths.astype(float)), twice),
        "lead_correlation": bootstrapped(
            correlation, (pairs.lead, (pairs.chosen_lengths - pairs.rejected_lengths).astype(float)), prompts
        ),
        "label_noise": lapse_rate(pairs.lead, prompts),
        "by_source": _groups(
            pairs, [(name, pairs.sources == n) for n, name in enumerate(pairs.source_names)]
        ),
        "by_length": _groups(pairs, _length_buckets(pairs.chosen_lengths - pairs.rejected_lengths)),
        "by_margin": _groups(pairs, _margin_buckets(pairs.margins)),
        "by_lead": _groups(pairs, _quantiles(np.abs(pairs.lead))),
    }
    return _plain(report)


def _reason(
    pairs: ScoredPairs, accuracy: Estimate, longer: Estimate, gain: Estimate, overconfidence: Estimate
) -> str:
    number, prompts = len(pairs.chosen), len(np.unique(pairs.prompts))
    of_prompts = f" of {prompts} prompts" if prompts != number else ""
    return (
        f"The model puts {accuracy.shown('.1%')} of {number} held-out pairs{of_prompts} in the right "
        f"order; chance is 50 %. The longer answer is the better one in {longer.shown('.1%')}, so the rule "
        f"to prefer the {'longer' if longer.value >= 0.5 else 'shorter'} one is right in "
        f"{max(longer.value, 1 - longer.value):.1%}: the model's lead over it is {gain.shown('+.1%')}. The "
        f"model's mean probability less its accuracy is {overconfidence.shown('+.1%')}. Intervals are of "
        "95 % and take the pairs of one prompt together."
    )


def _groups(pairs: ScoredPairs, masks: Sequence[tuple[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Accuracy of the model and of length in parts of the pairs; nothing for one that has all."""
    found = [
        {
            "name": name,
            "pairs": int(mask.sum()),
            "accuracy": rate(pairs.right[mask], pairs.prompts[mask]),
            "longer_answer_accuracy": rate(pairs.longer[mask], pairs.prompts[mask]),
        }
        for name, mask in masks
        if mask.any()
    ]
    return found if len(found) > 1 else []


def _length_buckets(longer: np.ndarray) -> list[tuple[str, np.ndarray]]:
    buckets = [("equally long", longer == 0)]
    for low, high in zip(EDGES, (*EDGES[1:], math.inf), strict=True):
        tokens = f"{low} to {high - 1}" if high < math.inf else f"{low} or more"
        buckets.append((f"chosen longer by {tokens} tokens", (longer >= low) & (longer < high)))
        buckets.insert(0, (f"chosen shorter by {tokens} tokens", (-longer >= low) & (-longer < high)))
    return buckets


def _margin_buckets(margins: np.ndarray) -> list[tuple[str, np.ndarray]]:
    values = np.unique(margins)
    if len(values) <= 6:
        return [(f"margin {value:g}", margins == value) for value in values]
    return _quantiles(margins)


def _quantiles(values: np.ndarray, number: int = 4) -> list[tuple[str, np.ndarray]]:
    edges = np.unique(np.quantile(values, np.linspace(0, 1, number + 1)))
    places = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, max(len(edges) - 2, 0))
    return [
        (f"{low:.3g} to {high:.3g}", places == place) for place, (low, high) in enumerate(pairwise(edges))
    ]


def _plain(value: Any) -> Any:
    """The value for JSON: estimates as objects, NaN as None."""
    if isinstance(value, Estimate):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def mistakes(pairs: ScoredPairs) -> np.ndarray:
    """The places of the pairs in the wrong order that the model is surest of, one per prompt."""
    order = np.argsort(pairs.lead, kind="stable")
    _, first = np.unique(pairs.prompts[order], return_index=True)
    worst = order[np.sort(first)]
    return worst[pairs.lead[worst] < 0][:NUM_MISTAKES]


def report_page(
    title: str, lead: str, pairs: ScoredPairs, report: dict[str, Any], wrong: Sequence[dict[str, Any]]
) -> str:
    """The page of a `reward_report`; `wrong` are the texts of `mistakes` with their scores."""
    words = report["verdict"]
    blocks: list[Block] = [Verdict(words, report["reason"], level_of(words)), _overview(report)]
    if len(pairs.chosen) < NUM_PLOTTED:
        blocks.append(Text(f"No plots: there are fewer than {NUM_PLOTTED} pairs.", faint=True))
    else:
        blocks.append(Section("Calibration, scores and length", [Plots(_plots(pairs))]))
    tables = (
        ("By data set", "by_source"),
        ("By length", "by_length"),
        ("By margin of the label", "by_margin"),
        ("By difference of the scores", "by_lead"),
    )
    blocks += [Section(name, [_group_table(report[key])]) for name, key in tables if report[key]]
    if wrong:
        blocks.append(
            Section("The most confident mistakes", [_sample(n, one) for n, one in enumerate(wrong, 1)])
        )
    blocks.append(Section("How the label noise is estimated", [Text(NOISE)], collapsed=True))
    return page(title, blocks, lead=lead)


def _overview(report: dict[str, Any]) -> Table:
    names = (
        ("accuracy", "accuracy", ".1%"),
        ("accuracy of the longer answer", "longer_answer_accuracy", ".1%"),
        ("gain over the rule of length", "gain_over_length", "+.1%"),
        ("expected calibration error", "calibration_error", ".3f"),
        ("mean probability less accuracy", "overconfidence", "+.3f"),
        ("correlation of score and length", "length_correlation", "+.2f"),
        ("correlation of the differences of both", "lead_correlation", "+.2f"),
        ("label noise, estimated", "label_noise", ".1%"),
    )
    rows = [(name, *_cells(report[key], form)) for name, key, form in names]
    return Table(rows, columns=("", "value", "95 % interval"))


def _group_table(groups: list[dict[str, Any]]) -> Table:
    rows = [
        (
            group["name"],
            str(group["pairs"]),
            "{} ({})".format(*_cells(group["accuracy"], ".1%")),
            _cells(group["longer_answer_accuracy"], ".1%")[0],
        )
        for group in groups
    ]
    return Table(rows, columns=("", "pairs", "accuracy", "longer answer"))


def _cells(estimate: dict[str, float | None], form: str) -> tuple[str, str]:
    value, low, high = (
        "-" if x is None else f"{x:{form}}" for x in (estimate[n] for n in ("value", "low", "high"))
    )
    return value, "unknown" if low == "-" else f"{low} to {high}"


def _sample(number: int, wrong: dict[str, Any]) -> Samples:
    texts = [
        (
            f"{name} by the label",
            wrong[name],
            f"score {wrong[f'{name}_score']:.3f}, {wrong[f'{name}_length']} tokens",
        )
        for name in ("chosen", "rejected")
    ]
    return Samples(f"Mistake {number}", wrong["prompt"], texts)


def _plots(pairs: ScoredPairs) -> list[Plot]:
    def calibration(axes: Axes) -> None:
        bins = calibration_curve(pairs.confidence, pairs.right)
        shares = [rate(pairs.right[b.rows], pairs.prompts[b.rows]) for b in bins]
        errors = np.array([(s.value - s.low, s.high - s.value) for s in shares]).T.clip(0)
        axes.plot([0.5, 1], [0.5, 1], color=SERIES[5], linestyle="--", linewidth=1)
        axes.errorbar([b.confidence for b in bins], [b.share for b in bins], errors, marker="o", markersize=4)
        axes.set_xlim(0.48, 1.02)

    def scores(axes: Axes) -> None:
        edges = np.histogram_bin_edges(np.concatenate([pairs.chosen, pairs.rejected]), 30).tolist()
        for name in ("chosen", "rejected"):
            axes.hist(getattr(pairs, name), edges, alpha=0.5, label=name)

    def lengths(axes: Axes) -> None:
        limit = max(1, len(pairs.chosen) // 1000)
        for name in ("chosen", "rejected"):
            axes.plot(
                getattr(pairs, f"{name}_lengths")[::limit],
                getattr(pairs, name)[::limit],
                "o",
                markersize=2,
                alpha=0.35,
                label=name,
            )

    return [
        plot(
            "Calibration",
            calibration,
            x="probability of the preferred answer",
            y="share that is right",
            note="With 95 % intervals; below the dashed line the model is surer than it is right.",
        ),
        plot("Scores", scores, x="score", y="answers", legend=True),
        plot("Score and length", lengths, x="tokens of the answer", y="score", legend=True),
    ]
