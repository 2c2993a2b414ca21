"""The numbers here are worked out by hand, in the comments beside them."""

import math

import numpy as np
import pytest
import torch

from dschat.losses import (
    advantages_and_returns,
    clipped_policy_loss,
    clipped_value_loss,
    discounted_returns,
    dpo_loss,
    dpo_metrics,
    group_advantages,
    implicit_reward,
    kl_estimate,
    kl_loss,
    kl_shaped_rewards,
    masked_mean,
    masked_whiten,
    pair_accuracy,
    pairwise_ranking_loss,
    policy_ratio,
    text_loss,
    truncated_importance_weights,
)


def row(*numbers: float) -> torch.Tensor:
    return torch.tensor([numbers], dtype=torch.float32)


def test_masked_mean_ignores_even_infinities_outside_the_mask():
    assert masked_mean(row(1, 3, math.inf), row(1, 1, 0)).item() == 2
    assert masked_mean(row(1, 3, math.nan), row(1, 1, 0), denominator=8).item() == 0.5


def test_masked_mean_of_nothing_is_zero():
    assert masked_mean(row(5, 6), row(0, 0)).item() == 0


def test_whitening_uses_the_variance_of_the_valid_entries():
    # 1 and 5: mean 3, variance ((-2)^2 + 2^2) / 2 = 4, so -1 and 1; the 100 is masked.
    torch.testing.assert_close(masked_whiten(row(1, 5, 100), row(1, 1, 0)), row(-1, 1, 0))


def test_whitening_a_single_token_gives_zero():
    assert masked_whiten(row(7, 100), row(1, 0)).tolist() == [[0, 0]]


# -ln sigmoid(2) = ln(1 + e^-2) = 0.1269280; of -2: 2.1269280; of 0: ln 2
@pytest.mark.parametrize("kind", ["log_sig", "log_exp"])
@pytest.mark.parametrize(("lead", "loss"), [(2, 0.1269280), (-2, 2.1269280), (0, 0.6931472), (-500, 500.0)])
def test_ranking_loss_of_a_lead(kind, lead, loss):
    actual = pairwise_ranking_loss(torch.tensor([1.0 + lead]), torch.tensor([1.0]), kind=kind)
    assert actual.tolist() == [pytest.approx(loss)]


@pytest.mark.parametrize("kind", ["log_sig", "log_exp"])
def test_ranking_loss_has_the_gradient_of_its_formula_and_does_not_overflow(kind):
    leads = [-200.0, -3.0, 0.0, 3.0, 200.0]
    chosen = torch.tensor(leads, requires_grad=True)
    loss = pairwise_ranking_loss(chosen, torch.zeros(5), kind=kind)
    loss.sum().backward()
    # Of log(1 + e^-x), whose derivative is -1 / (1 + e^x), in Python's doubles.
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-x)) for x in leads], rel=1e-6, abs=1e-30)
    assert chosen.grad.tolist() == pytest.approx([-1 / (1 + math.exp(x)) for x in leads], rel=1e-5, abs=1e-30)


def test_ranking_loss_takes_the_margin_off_the_lead():
    actual = pairwise_ranking_loss(torch.tensor([3.0]), torch.tensor([0.0]), margin=torch.tensor([1.0]))
    assert actual.item() == pytest.approx(0.1269280)


# log-ratio ln 2: k1 = 0.6931472, k2 = 0.5 * 0.4804530, k3 = 1/2 - 1 + 0.6931472
# log pi: chosen -1, rejected -3; log pi_ref: -2 and -2. h = (-1 + 2) - (-3 + 2) = 2; at beta 0.5 beta h = 1.
# -log sigmoid(1) = 0.3132617, -log sigmoid(-1) = 1.3132617; sigmoid(1) = 0.7310586, sigmoid(-1) = 0.2689414.
@pytest.mark.parametrize(
    ("kind", "beta", "smoothing", "loss", "slope"),
    [
        ("sigmoid", 0.5, 0.0, 0.3132617, -0.5 * 0.2689414),
        ("sigmoid", 0.5, 0.1, 0.9 * 0.3132617 + 0.1 * 1.3132617, -0.45 * 0.2689414 + 0.05 * 0.7310586),
        ("ipo", 0.5, 0.0, 1.0, 2.0),  # (2 - 1)^2, 2 (2 - 1)
        ("ipo", 0.1, 0.0, 9.0, -6.0),  # (2 - 5)^2, 2 (2 - 5)
    ],
)
def test_dpo_loss_and_gradient_at_known_logprobs(kind, beta, smoothing, loss, slope):
    policy = [torch.tensor([x], requires_grad=True) for x in (-1.0, -3.0)]
    reference = [torch.tensor([-2.0], requires_grad=True) for _ in range(2)]
    actual = dpo_loss(*policy, *reference, beta=beta, label_smoothing=smoothing, kind=kind)
    assert actual.item() == pytest.approx(loss, abs=1e-6)
    actual.sum().backward()
    slopes = [x.grad.item() for x in (*policy, *reference)]
    assert slopes == pytest.approx([slope, -slope, -slope, slope], abs=1e-6)


def dpo_by_the_papers(policy, reference, beta, smoothing, kind):
    """One pair's loss, in probabilities, as the papers write it; (chosen, rejected) log-probabilities."""
    ratio = np.exp(np.subtract(policy, reference))  # pi / pi_ref
    if kind == "ipo":  # 2310.12036, Eq. 17: (h - 1 / (2 tau))^2
        return (np.log(ratio[0] / ratio[1]) - 1 / (2 * beta)) ** 2
    # 2305.18290: Bradley-Terry's probability that the chosen answer wins, the rewards being beta log ratio.
    strengths = ratio**beta
    preferred = strengths[0] / strengths.sum()
    return -(1 - smoothing) * np.log(preferred) - smoothing * np.log(1 - preferred)


@pytest.mark.parametrize(
    ("kind", "beta", "smoothing"),
    [
        ("sigmoid", 0.1, 0.0),
        ("sigmoid", 0.7, 0.2),
        ("sigmoid", 2.0, 0.4),
        ("ipo", 0.1, 0.0),
        ("ipo", 1.0, 0.0),
    ],
)
def test_dpo_loss_and_gradient_are_those_of_another_implementation(kind, beta, smoothing):
    policy, reference = np.random.default_rng(0).normal(-5, 2, (2, 6, 2))
    settings = {"beta": beta, "label_smoothing": smoothing, "kind": kind}
    tensor = torch.tensor(policy, dtype=torch.float32, requires_grad=True)
    losses = dpo_loss(*tensor.unbind(1), *torch.tensor(reference).float().unbind(1), **settings)
    losses.sum().backward()
    for pair in range(6):
        expected = dpo_by_the_papers(policy[pair], reference[pair], beta, smoothing, kind)
        assert losses[pair].item() == pytest.approx(expected, rel=1e-4)
        for answer in range(2):
            step = np.eye(2)[answer] * 1e-5
            above, below = (
                dpo_by_the_papers(policy[pair] + sign * step, reference[pair], beta, smoothing, kind)
                for sign in (1, -1)
            )
            assert tensor.grad[pair, answer].item() == pytest.approx((above - below) / 2e-5, rel=1e-3)


def test_dpo_loss_of_a_hopeless_pair_is_finite():
    # beta h = -0.5 * 4000: the loss is its size, where exp() would be infinite.
    far = torch.tensor([-1000.0]), torch.tensor([1000.0]), torch.tensor([1000.0]), torch.tensor([-1000.0])
    assert dpo_loss(*far, beta=0.5).item() == 2000


def test_dpo_figures_count_a_tie_half_and_have_one_gradient():
    # Rewards at beta 0.5: chosen 1, 0, 0; rejected 0.5, 0, 1.
    logprobs = torch.tensor([-1.0, -2, -3, -4, -5, -6], requires_grad=True)
    reference = torch.tensor([-3.0, -2, -3, -5, -5, -8])
    figures = dpo_metrics(logprobs, reference, beta=0.5)
    assert figures["chosen_reward"].tolist() == [1, 0, 0]
    assert figures["rejected_reward"].tolist() == [0.5, 0, 1]
    assert figures["reward_margin"].tolist() == [0.5, 0, -1]
    assert figures["accuracy"].tolist() == [1, 0.5, 0]
    assert figures["chosen_logprob"].tolist() == [-1, -2, -3]
    assert figures["rejected_logprob"].tolist() == [-4, -5, -6]
    assert [name for name, values in figures.items() if values.requires_grad] == ["loss"]


def test_the_implicit_reward_of_the_reference_model_is_zero():
    logprobs = torch.tensor([-0.1, -123.456])
    assert implicit_reward(logprobs, logprobs.clone(), beta=0.3).tolist() == [0, 0]


@pytest.mark.parametrize(("kind", "value"), [("k1", 0.6931472), ("k2", 0.2402265), ("k3", 0.1931472)])
def test_kl_estimates_at_a_ratio_of_two(kind, value):
    assert kl_estimate(row(math.log(2)), row(0), kind).item() == pytest.approx(value)


# d k1 = 1, d k2 = the log-ratio, d k3 = 1 - exp(-k1) = 1/2 by the log-probability; over four tokens
@pytest.mark.parametrize(
    ("kind", "value", "gradient"),
    [("k1", 0.6931472, 1), ("k2", 0.2402265, 0.6931472), ("k3", 0.1931472, 0.5)],
)
@pytest.mark.parametrize("padding", [0.0, 1e9, math.nan])
def test_kl_in_the_loss_has_the_value_and_the_gradient_of_its_estimate(kind, value, gradient, padding):
    logprobs = row(math.log(2), padding).requires_grad_()
    loss = kl_loss(logprobs, row(0, 0), row(1, 0), kind=kind, denominator=4)
    loss.backward()
    assert loss.item() == pytest.approx(value / 4)
    assert logprobs.grad.tolist() == [[pytest.approx(gradient / 4), 0]]


@pytest.mark.parametrize(("kind", "value"), [("k2", 0.2402265), ("k3", 0.1931472)])
def test_rewards_take_the_kl_estimate_they_are_told(kind, value):
    rewards = kl_shaped_rewards(
        torch.tensor([3.0]), row(math.log(2)), row(0), row(1), kl_coef=0.1, score_clip=0, kl_estimator=kind
    )
    assert rewards.item() == pytest.approx(3 - 0.1 * value)


def test_rewards_are_the_kl_penalty_and_the_score_on_the_last_token():
    # beta 0.1; k1 = (1, -2, 0.5); the score 3 joins the last of them.
    rewards = kl_shaped_rewards(
        torch.tensor([3.0]), row(1, -2, 0.5, 9), row(0, 0, 0, 0), row(1, 1, 1, 0), kl_coef=0.1, score_clip=5
    )
    torch.testing.assert_close(rewards, row(-0.1, 0.2, 2.95, 0))


def test_rewards_add_up_to_the_score_minus_the_kl_penalty():
    generator = torch.Generator().manual_seed(0)
    logprobs, ref_logprobs = torch.randn(2, 4, 6, generator=generator)
    mask = torch.arange(6) < torch.tensor([[1], [6], [3], [0]])
    scores = torch.tensor([1.0, -2.0, 0.5, 4.0])
    rewards = kl_shaped_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=0.3, score_clip=0)
    kl = torch.stack([(logprobs - ref_logprobs)[i, :n].sum() for i, n in enumerate((1, 6, 3, 0))])
    expected = torch.tensor([1.0, -2.0, 0.5, 0.0]) - 0.3 * kl  # a row without tokens earns nothing
    torch.testing.assert_close(rewards.sum(dim=1), expected)


@pytest.mark.parametrize(("score", "clip", "reward"), [(7, 5, 5), (-7, 5, -5), (7, 0, 7)])
def test_scores_are_clipped_unless_the_clip_is_zero(score, clip, reward):
    rewards = kl_shaped_rewards(
        torch.tensor([float(score)]), row(0), row(0), row(1), kl_coef=0.1, score_clip=clip
    )
    assert rewards.item() == reward


def test_gae_on_three_tokens():
    # gamma 0.5, lambda 0.5; values 1 2 4, rewards 0 1 2, the fourth column is padding.
    # d3 = 2 - 4 = -2;             A3 = -2
    # d2 = 1 + 0.5*4 - 2 = 1;      A2 = 1 + 0.25*(-2) = 0.5
    # d1 = 0 + 0.5*2 - 1 = 0;      A1 = 0 + 0.25*0.5 = 0.125
    advantages, returns = advantages_and_returns(
        row(1, 2, 4, 99), row(0, 1, 2, 99), row(1, 1, 1, 0), gamma=0.5, gae_lambda=0.5
    )
    torch.testing.assert_close(advantages, row(0.125, 0.5, -2, 0))
    torch.testing.assert_close(returns, row(1.125, 2.5, 2, 0))


def test_gae_with_gamma_and_lambda_one_is_the_reward_to_come_less_the_value():
    # rewards to come: 6, 5, 3
    advantages, returns = advantages_and_returns(
        row(10, 20, 30), row(1, 2, 3), row(1, 1, 1), gamma=1, gae_lambda=1
    )
    torch.testing.assert_close(advantages, row(-4, -15, -27))
    torch.testing.assert_close(returns, row(6, 5, 3))


def test_gae_gives_an_empty_and_a_one_token_answer_their_due():
    values, rewards = torch.tensor([[5.0, 5.0], [1.0, 5.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    mask = torch.tensor([[0, 0], [1, 0]])
    advantages, returns = advantages_and_returns(values, rewards, mask, gamma=1, gae_lambda=0.95)
    assert advantages.tolist() == [[0, 0], [2, 0]]
    assert returns.tolist() == [[0, 0], [3, 0]]


# Two prompts, their answers in turn: scores 1 2 6 to prompt 7 and 4 4 4 to prompt 3.
SCORES, GROUPS = torch.tensor([1.0, 4, 2, 4, 6, 4]), torch.tensor([7, 3, 7, 3, 7, 3])


def test_rloo_subtracts_the_mean_of_the_other_answers():
    # 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2
    actual = group_advantages(SCORES, GROUPS, "rloo")
    torch.testing.assert_close(actual, torch.tensor([-3.0, 0, -1.5, 0, 4.5, 0]))


def test_grpo_brings_each_group_to_mean_zero_and_variance_one():
    # mean 3, variance (4 + 1 + 9) / 3; where all scores are equal nothing is learned
    std = (14 / 3) ** 0.5
    actual = group_advantages(SCORES, GROUPS, "grpo")
    torch.testing.assert_close(actual, torch.tensor([-2 / std, 0, -1 / std, 0, 3 / std, 0]))


@pytest.mark.parametrize("score", [0.1, 1e6 + 0.1])
def test_grpo_does_not_enlarge_rounding_in_a_group_of_equal_scores(score):
    actual = group_advantages(torch.full((3,), score), torch.zeros(3, dtype=torch.long), "grpo")
    assert actual.abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_an_answer_alone_in_its_group_is_a_bug(kind):
    with pytest.raises(AssertionError, match="nothing to be compared with"):
        group_advantages(torch.ones(3), torch.tensor([0, 0, 1]), kind)


def test_comparing_answers_takes_memory_in_proportion_to_their_number():
    # 200,000 answers to 50,000 prompts, the group's scores 0 to 3: all against all would take 320 GB
    scores, groups = torch.arange(4.0).repeat(50_000), torch.arange(50_000).repeat_interleave(4)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))
    actual = group_advantages(scores[order], groups[order], "rloo")
    torch.testing.assert_close(actual, (scores[order] - 1.5) * 4 / 3)  # the mean of the others: (6 - s) / 3


def test_reinforce_pp_gives_a_token_the_score_less_the_kl_penalty_from_it_on():
    # beta 0.1, k1 = 1 -2 0.5, score 3: 3 - 0.1 (1 - 2 + 0.5), 3 - 0.1 (-2 + 0.5), 3 - 0.1 x 0.5
    mask = row(1, 1, 1, 0)
    rewards = kl_shaped_rewards(
        torch.tensor([3.0]), row(1, -2, 0.5, 9), row(0, 0, 0, 0), mask, kl_coef=0.1, score_clip=0
    )
    torch.testing.assert_close(discounted_returns(rewards, mask, gamma=1), row(3.05, 3.15, 2.95, 0))
    # gamma 0.5: 2.95; 0.2 + 1.475; -0.1 + 0.8375
    torch.testing.assert_close(discounted_returns(rewards, mask, gamma=0.5), row(0.7375, 1.675, 2.95, 0))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"), [(1.5, 1, -1.2), (1.5, -1, 1.5), (0.5, 1, -0.5), (0.5, -1, 0.8)]
)
def test_policy_loss_clips_only_what_would_flatter(ratio, advantage, loss):
    actual = clipped_policy_loss(row(math.log(ratio)), row(0), row(advantage), row(1), ratio_clip=0.2)
    assert actual.item() == pytest.approx(loss)


@pytest.mark.parametrize(("ratio", "loss"), [(1.25, -1.25), (1.5, -1.3), (0.5, -0.5)])
def test_an_upper_clip_of_its_own_leaves_more_room_above(ratio, loss):
    actual = clipped_policy_loss(
        row(math.log(ratio)), row(0), row(1), row(1), ratio_clip=0.2, ratio_clip_high=0.3
    )
    assert actual.item() == pytest.approx(loss)


# A = -2: the plain loss is 2 max(ratio, 0.8); from ratio 3 on it is held at 3 x 2. A = 2 is not touched.
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [(2.9, -2, 5.8, 5.8), (10, -2, 6, 0), (0.5, -2, 1.6, 0), (10, 2, -2.4, 0), (1.1, 2, -2.2, -2.2)],
)
def test_the_dual_clip_bounds_the_loss_of_a_negative_advantage(ratio, advantage, loss, gradient):
    logprobs = row(math.log(ratio)).requires_grad_()
    actual = clipped_policy_loss(logprobs, row(0), row(advantage), row(1), ratio_clip=0.2, dual_clip=3)
    actual.backward()
    assert actual.item() == pytest.approx(loss)
    assert logprobs.grad.item() == pytest.approx(gradient)


@pytest.mark.parametrize(("ratio", "weight"), [(1, 1), (0.25, 0.25), (1.5, 1.5), (2.5, 2)])
def test_importance_weights_are_truncated_above_only(ratio, weight):
    # the second token is padding; garbage there weighs 1
    trained, sampled = row(math.log(0.4), 5).requires_grad_(), row(math.log(0.4 / ratio), math.nan)
    weights = truncated_importance_weights(trained, sampled, row(1, 0), cap=2.0)
    assert weights.tolist() == [[pytest.approx(weight), 1]]
    assert not weights.requires_grad


def test_weights_multiply_the_loss_and_the_gradient_of_each_token():
    # ratio 1, advantages 2 and -1, weights 0.5 and 2: -(1) and 2, over two tokens; the third does not count
    logprobs = row(-1, -2, -3).requires_grad_()
    rest = (row(-1, -2, -3), row(2, -1, 5), row(1, 1, 0))
    loss = clipped_policy_loss(logprobs, *rest, ratio_clip=0.2, weights=row(0.5, 2, 7))
    loss.backward()
    assert loss.item() == pytest.approx((-1 + 2) / 2)
    torch.testing.assert_close(logprobs.grad, row(-0.5, 1, 0))


def test_the_dual_clip_comes_before_the_weight():
    # ratio 10, advantage -2: 20, bounded to 3 x 2, times 0.5
    args = (row(math.log(10)), row(0), row(-2), row(1))
    loss = clipped_policy_loss(*args, ratio_clip=0.2, dual_clip=3, weights=row(0.5))
    assert loss.item() == pytest.approx(3)


def test_policy_loss_is_divided_by_the_count_it_is_given():
    # three tokens of ratio 1 and advantages 1 2 3: -6 over 12
    actual = clipped_policy_loss(
        row(0, 0, 0, 0), row(0, 0, 0, 9), row(1, 2, 3, 9), row(1, 1, 1, 0), ratio_clip=0.2, denominator=12
    )
    assert actual.item() == pytest.approx(-0.5)


def test_policy_gradient_at_ratio_one_is_minus_the_advantage():
    logprobs = row(-1, -2, -3).requires_grad_()
    clipped_policy_loss(logprobs, row(-1, -2, -3), row(2, -1, 5), row(1, 1, 0), ratio_clip=0.2).backward()
    torch.testing.assert_close(logprobs.grad, row(-1, 0.5, 0))  # over two tokens


def test_ratio_of_a_hopeless_token_stays_finite():
    ratio = policy_ratio(row(1000, -1000, math.nan), row(0, 0, 0), row(1, 1, 0))
    assert ratio.tolist() == [[pytest.approx(math.exp(20)), pytest.approx(math.exp(-20)), 1]]


@pytest.mark.parametrize(
    ("value", "loss"),
    [
        (1.1, 0.5 * 0.9**2),  # inside the clip: the plain error to the return 2
        (1.8, 0.5 * 0.8**2),  # beyond it the error of 1.2, the worse of the two
        (0.0, 0.5 * 2.0**2),  # the clipped 0.8 would flatter
    ],
)
def test_value_loss_takes_the_worse_of_plain_and_clipped(value, loss):
    actual = clipped_value_loss(row(value), row(1), row(2), row(1), value_clip=0.2)
    assert actual.item() == pytest.approx(loss)


def test_the_loss_of_text_is_the_negative_log_likelihood_over_the_tokens_of_the_whole_step():
    # the first token has probability 3/4, the second 1/4, over eight tokens of the whole step
    loss = text_loss(row(math.log(3 / 4), math.log(1 / 4)), denominator=8)
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 8)


@pytest.mark.parametrize("padding", [0.0, 1e9, math.nan])
def test_losses_do_not_see_padding(padding):
    def padded(*numbers: float) -> torch.Tensor:
        return row(*numbers, padding)

    mask = row(1, 1, 0)
    policy = clipped_policy_loss(padded(-1, -2), padded(-1.1, -2), padded(1, 2), mask, ratio_clip=0.2)
    value = clipped_value_loss(padded(1, 2), padded(1, 2), padded(2, 4), mask, value_clip=0.2)
    assert policy.item() == pytest.approx(-(math.exp(0.1) + 2) / 2)
    assert value.item() == pytest.approx((0.5 * 1 + 0.5 * 4) / 2)


def test_a_tie_is_half_accurate_so_that_a_constant_score_is_no_better_or_worse_than_chance():
    chosen, rejected = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([0.0, 2.0, 4.0])
    assert pair_accuracy(chosen, rejected).tolist() == [1, 0.5, 0]
