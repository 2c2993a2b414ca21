"""The report on a reward model: its words for models whose fault is known, by simulated scores."""

from dataclasses import replace

import numpy as np
import pytest

from dschat.reports.reward_model import ScoredPairs, mistakes, report_page, reward_report

NUMBER = 600


def pairs(
    score, *, seed: int = 0, number: int = NUMBER, longer: float = 0.6, noise: float = 0.0
) -> ScoredPairs:
    """Pairs of answers whose quality decides the label, 3 in 5 of which the longer answer wins.

    `score(quality, length, random)` is the model; labels are wrong in a share of `noise`.
    """
    random = np.random.default_rng(seed)
    quality = random.logistic(size=(number, 2))
    better = quality.argmax(axis=1)
    better = np.where(random.random(number) < noise, 1 - better, better)
    length = np.sort(random.integers(5, 300, size=(number, 2)), axis=1)  # the second is longer
    wins = random.random(number) < longer
    length = np.where((better == 1)[:, None] == wins[:, None], length, length[:, ::-1])
    scores = score(quality, length, random)
    rows = np.arange(number)
    return ScoredPairs(
        chosen=scores[rows, better],
        rejected=scores[rows, 1 - better],
        chosen_lengths=length[rows, better],
        rejected_lengths=length[rows, 1 - better],
        prompts=rows // 2,
        sources=rows % 2,
        source_names=["a.jsonl", "b.jsonl"],
        margins=np.zeros(number),
    )


def calibrated(quality, length, random):
    return quality


def by_length(quality, length, random):
    return length / 400


def at_random(quality, length, random):
    return random.normal(size=quality.shape)


def unsure(quality, length, random):
    """Right in four of five, and surer than that."""
    return 8 * np.sign(quality - quality.mean(axis=1, keepdims=True) + random.logistic(size=quality.shape))


@pytest.mark.parametrize(
    ("model", "settings", "verdict"),
    [
        (calibrated, {}, "good"),
        (by_length, {}, "no better than length"),
        (by_length, {"longer": 0.3}, "worse than chance"),
        (lambda q, n, r: -n / 400, {"longer": 0.4}, "no better than length"),  # the shorter one is better
        (at_random, {}, "no better than chance"),
        (lambda q, n, r: -q, {}, "worse than chance"),
        (lambda q, n, r: 0 * q, {}, "no better than chance"),
        (unsure, {}, "overconfident"),
        (by_length, {"longer": 0.8, "number": 30}, "no better than length"),
        (calibrated, {"number": 6, "seed": 3}, "too few pairs to say"),
    ],
)
def test_the_words_for_a_model_whose_fault_is_known(model, settings, verdict):
    assert reward_report(pairs(model, **settings))["verdict"] == verdict


def test_words_are_of_tests_and_not_of_values():
    """A random model is called no better than chance, or too little seen of, in most draws."""
    for number in (30, 300):
        words = [reward_report(pairs(at_random, seed=seed, number=number))["verdict"] for seed in range(8)]
        assert sum(word in ("no better than chance", "too few pairs to say") for word in words) >= 7


def test_the_numbers_by_hand():
    """Four pairs of three prompts: right, wrong, equal, right; the longer answer is the chosen one in two."""
    four = ScoredPairs(
        chosen=np.array([2.0, 0.0, 1.0, 3.0]),
        rejected=np.array([0.0, 1.0, 1.0, 0.0]),
        chosen_lengths=np.array([10, 5, 7, 200]),
        rejected_lengths=np.array([4, 9, 7, 3]),
        prompts=np.array([0, 0, 1, 2]),
        sources=np.array([0, 0, 0, 1]),
        source_names=["a", "b", "unused"],
        margins=np.array([1.0, 1.0, 2.0, 2.0]),
    )
    found = reward_report(four)
    assert (found["pairs"], found["prompts"]) == (4, 3)
    assert found["accuracy"]["value"] == 2.5 / 4
    assert found["longer_answer_accuracy"]["value"] == 2.5 / 4
    assert found["gain_over_length"]["value"] == 0.0
    # sigmoid of 2, 1, 0, 3: 0.8808, 0.7311, 0.5, 0.9526
    assert found["overconfidence"]["value"] == pytest.approx(
        (0.8808 + 0.7311 + 0.5 + 0.9526) / 4 - 0.625, abs=1e-4
    )
    sources = [(group["name"], group["pairs"], group["accuracy"]["value"]) for group in found["by_source"]]
    assert sources == [("a", 3, 0.5), ("b", 1, 1.0)]
    assert [(group["name"], group["pairs"]) for group in found["by_length"]] == [
        ("chosen shorter by 1 to 9 tokens", 1),
        ("equally long", 1),
        ("chosen longer by 1 to 9 tokens", 1),
        ("chosen longer by 50 to 199 tokens", 1),
    ]
    assert [(group["name"], group["accuracy"]["value"]) for group in found["by_margin"]] == [
        ("margin 1", 0.5),
        ("margin 2", 0.75),
    ]
    assert list(mistakes(four)) == [1]


def test_one_pair_and_equal_scores_make_a_report_too():
    one = pairs(at_random, number=1)
    found = reward_report(one)
    assert found["verdict"] == "too few pairs to say"
    assert found["calibration_error"]["low"] is None  # of one prompt nothing is known
    assert "fewer than 20 pairs" in report_page("t", "", one, found, [])


def test_mistakes_are_the_surest_first_and_one_per_prompt():
    simulated = pairs(calibrated, noise=0.3)
    worst = mistakes(simulated)
    lead = simulated.lead
    assert len(worst) == 10
    assert list(lead[worst]) == sorted(lead[worst])
    assert len(set(simulated.prompts[worst])) == 10
    assert lead[worst[0]] == lead.min()


def test_the_page_says_all_of_it(tmp_path):
    simulated = replace(pairs(unsure), margins=np.repeat([0.5, 1.0, 2.0], NUMBER // 3))
    found = reward_report(simulated)
    wrong = {"prompt": "Why <b>?", "chosen": "good", "rejected": "bad", "chosen_score": -1.0}
    wrong |= {"rejected_score": 3.0, "chosen_length": 2, "rejected_length": 5}
    html = report_page("Reward model", "m", simulated, found, [wrong])
    for text in (
        "overconfident",
        "a.jsonl",
        "margin 0.5",
        "chosen longer by 200 or more tokens",
        "Why &lt;b&gt;?",
    ):
        assert text in html
    assert "score 3.000, 5 tokens" in html
    assert html.count("<svg") == 3
