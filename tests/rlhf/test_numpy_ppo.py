"""Our mathematics against the papers' formulas in plain NumPy, on random answers of random lengths."""

from dataclasses import dataclass

import numpy as np
import numpy_ppo as reference
import pytest
import torch
from experiences import build_experience
from torch import Tensor

from dschat.arguments import PpoArguments
from dschat.losses import clipped_policy_loss, clipped_value_loss, kl_loss, truncated_importance_weights
from dschat.rlhf.experience import AnswerAnalysis, Experience, MinibatchSampler, ScoreShaping
from dschat.rlhf.rollout.batch import RolloutBatch

NUM_ANSWERS, LONGEST, BETA = 12, 7, 0.3
GROUPS = np.arange(NUM_ANSWERS) % 3
SEEDS = range(10)


@dataclass
class Answers:
    """Random numbers of every kind; beyond an answer's length they are garbage that must not count."""

    lengths: np.ndarray
    scores: np.ndarray
    columns: dict[str, np.ndarray]

    @staticmethod
    def random(seed: int) -> "Answers":
        draw = np.random.default_rng(seed)
        names = ("new", "old", "ref", "values", "new_values")
        columns = {name: draw.normal(size=(NUM_ANSWERS, LONGEST)) for name in names}
        columns["new"] = columns["old"] + 0.5 * columns["new"]  # some ratios inside the clip, some outside
        return Answers(draw.integers(1, LONGEST + 1, NUM_ANSWERS), 2 * draw.normal(size=NUM_ANSWERS), columns)

    @property
    def mask(self) -> Tensor:
        return torch.arange(LONGEST) < torch.from_numpy(self.lengths)[:, None]

    def padded(self, name: str) -> Tensor:
        return torch.from_numpy(self.columns[name])

    def each(self, name: str) -> list[np.ndarray]:
        return [row[:n].copy() for row, n in zip(self.columns[name], self.lengths, strict=True)]

    def rewards(self, beta: float = BETA) -> list[np.ndarray]:
        rows = zip(self.scores, self.each("old"), self.each("ref"), strict=True)
        return [reference.rewards(*row, beta) for row in rows]

    def experience(self, **settings) -> Experience:
        args = PpoArguments(kl_coef=BETA, reward_clip=0.0, **settings)
        attention = torch.cat([torch.ones(NUM_ANSWERS, 1), self.mask], dim=1).long()
        rollout = RolloutBatch(
            input_ids=attention,
            attention_mask=attention,
            answer_mask=self.mask,
            ended=torch.ones(NUM_ANSWERS, dtype=torch.bool),
            prompt_rows=torch.from_numpy(GROUPS),
            prompt_length=1,
        )
        old, ref, values = (self.padded(name) for name in ("old", "ref", "values"))
        judgement = AnswerAnalysis(old, old, ref, values, torch.from_numpy(self.scores))
        return build_experience(
            rollout, judgement, args, MinibatchSampler(1, 1, 1, 0, 0), ScoreShaping(0, 0), ppo_step=0
        )


def assert_rows(actual: Tensor, expected: list[np.ndarray]) -> None:
    for row, numbers in zip(actual, expected, strict=True):
        np.testing.assert_allclose(row[: len(numbers)], numbers, rtol=1e-6, atol=1e-6)
        assert not row[len(numbers) :].any()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.8, 0.0)])
def test_gae_returns_and_whitening(seed, gamma, lam):
    answers = Answers.random(seed)
    experience = answers.experience(gamma=gamma, gae_lambda=lam)
    rows = zip(answers.each("values"), answers.rewards(), strict=True)
    expected = [reference.gae(values, rewards, gamma, lam) for values, rewards in rows]
    assert_rows(experience.raw_advantages, expected)
    assert_rows(experience.returns, [a + v for a, v in zip(expected, answers.each("values"), strict=True)])
    assert_rows(experience.advantages, reference.whitened(expected))


@pytest.mark.parametrize("seed", SEEDS)
def test_reinforce_pp(seed):
    answers = Answers.random(seed)
    expected = [reference.rewards_to_go(rewards) for rewards in answers.rewards()]
    assert_rows(
        answers.experience(advantage_estimator="reinforce++").advantages, reference.whitened(expected)
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_groups(seed, kind):
    answers = Answers.random(seed)
    # RLOO's KL is in the rewards, GRPO's in the loss.
    earned = np.array([r.sum() for r in answers.rewards(BETA if kind == "rloo" else 0.0)])
    expected = np.empty(NUM_ANSWERS)
    for group in range(3):
        rows = group == GROUPS
        expected[rows] = getattr(reference, kind)(earned[rows])
    lengths = answers.lengths
    assert_rows(
        answers.experience(advantage_estimator=kind).advantages,
        [np.full(n, a) for n, a in zip(lengths, expected, strict=True)],
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("low", "high", "dual"), [(0.2, 0.2, None), (0.2, 0.4, None), (0.1, 0.2, 1.5)])
def test_policy_loss(seed, low, high, dual):
    answers = Answers.random(seed)
    actual = clipped_policy_loss(
        answers.padded("new"),
        answers.padded("old"),
        answers.padded("values"),
        answers.mask,
        ratio_clip=low,
        ratio_clip_high=high,
        dual_clip=dual,
        denominator=float(answers.lengths.sum()),
    )
    rows = (answers.each(name) for name in ("new", "old", "values"))
    assert actual.item() == pytest.approx(reference.policy_loss(*rows, low, high, dual), rel=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("cap", [1.1, 2.0, 50.0])
def test_policy_loss_of_tokens_that_another_engine_sampled(seed, cap):
    answers = Answers.random(seed)
    new, old, sampled, advantages = (answers.padded(name) for name in ("new", "old", "ref", "values"))
    weights = truncated_importance_weights(old, sampled, answers.mask, cap=cap)
    actual = clipped_policy_loss(
        new, old, advantages, answers.mask, ratio_clip=0.2, dual_clip=1.5, weights=weights
    )
    rows = (answers.each(name) for name in ("new", "old", "values"))
    expected = reference.policy_loss(*rows, 0.2, 0.2, 1.5, sampled=answers.each("ref"), cap=cap)
    assert actual.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("clip", [0.2, 1.0])
def test_value_loss(seed, clip):
    answers = Answers.random(seed)
    names = ("new_values", "values", "ref")
    actual = clipped_value_loss(*(answers.padded(n) for n in names), answers.mask, value_clip=clip)
    assert actual.item() == pytest.approx(
        reference.value_loss(*(answers.each(n) for n in names), clip), rel=1e-9
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_kl_loss(seed):
    answers = Answers.random(seed)
    actual = kl_loss(answers.padded("new"), answers.padded("ref"), answers.mask, kind="k3")
    assert actual.item() == pytest.approx(
        reference.kl_loss(answers.each("new"), answers.each("ref")), rel=1e-9
    )
