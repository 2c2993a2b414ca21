"""The mathematics of RLHF, torch only: no model, device, rank or engine.

Shapes: B answers (or pairs), T answer tokens, V vocabulary. Answers are aligned as in docs/ppo.md: column t
holds what belongs to the decision to emit answer token t, and `mask` is 1 up to and including the first end
token. A *score* is per answer, a *reward* per token.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""exp() of a larger log-ratio helps no one and overflows fp16."""


def masked_mean(x: Tensor, mask: Tensor, *, denominator: float | Tensor | None = None) -> Tensor:
    """Sum of x where mask is 1, over `denominator` (default: the mask's own count, at least 1). -> scalar.

    x may hold anything, even infinities, where the mask is 0. A denominator counted over all micro-batches
    and ranks makes the parts add up to the mean of the whole.
    """
    total = torch.where(mask.bool(), x, 0).sum()
    return total / (mask.sum().clamp(min=1) if denominator is None else denominator)


def masked_whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / std over the valid entries, 0 elsewhere; population variance. [B, T] -> [B, T].

    Hand it the rollout batch of all ranks: statistics of a part are other statistics.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return torch.where(mask.bool(), (x - mean) * torch.rsqrt(variance + 1e-8), 0)


def pairwise_ranking_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    kind: Literal["log_sig", "log_exp"] = "log_sig",
    margin: Tensor | None = None,
) -> Tensor:
    """Bradley-Terry loss of each pair, InstructGPT (https://arxiv.org/abs/2203.02155) Eq. 1. [B], [B] -> [B].

    "log_sig" is -log sigmoid(chosen - rejected), "log_exp" log(1 + exp(rejected - chosen)): equal numbers,
    both computed without overflow. A `margin` [B] is what the chosen score must lead by.
    """
    lead = chosen_scores.float() - rejected_scores.float()
    if margin is not None:
        lead = lead - margin
    return -F.logsigmoid(lead) if kind == "log_sig" else F.softplus(-lead)


def implicit_reward(logprobs: Tensor, ref_logprobs: Tensor, *, beta: float) -> Tensor:
    """beta (log pi - log pi_ref) of answers, DPO's reward up to a number per prompt. [B], [B] -> [B].

    https://arxiv.org/abs/2305.18290, section 4; exactly 0 where the two log-probabilities are equal.
    """
    return beta * (logprobs - ref_logprobs)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    kind: Literal["sigmoid", "ipo"] = "sigmoid",
) -> Tensor:
    """DPO's loss of each pair from four log-probabilities of answers, in nats. [B] each -> [B].

    With h = log pi/pi_ref of the chosen answer less that of the rejected one:
    "sigmoid" is -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), https://arxiv.org/abs/2305.18290 Eq. 7
    with the label smoothing e of conservative DPO (Eric Mitchell, "A note on DPO with noisy preferences",
    2023), where a share e of the labels is taken to be wrong. It wants sums over the answer's tokens.
    "ipo" is (h - 1 / (2 beta))^2, https://arxiv.org/abs/2310.12036 Eq. 17; `label_smoothing` is no part of
    it. It wants means a token, or the distance it aims at would ask more of every token of a short answer.
    """
    h = (policy_chosen.float() - ref_chosen.float()) - (policy_rejected.float() - ref_rejected.float())
    if kind == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)


def dpo_metrics(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    kind: Literal["sigmoid", "ipo"] = "sigmoid",
) -> dict[str, Tensor]:
    """`dpo_loss` of each pair and what to watch beside it, the chosen answers' half first. [2B] -> [B] each.

    Only "loss" has a gradient. A pair whose rewards are equal, as all are at the start, is half accurate.
    """
    (chosen, rejected), (ref_chosen, ref_rejected) = logprobs.chunk(2), ref_logprobs.chunk(2)
    loss = dpo_loss(
        chosen, rejected, ref_chosen, ref_rejected, beta=beta, label_smoothing=label_smoothing, kind=kind
    )
    rewards = implicit_reward(logprobs.detach(), ref_logprobs, beta=beta)
    chosen_reward, rejected_reward = rewards.chunk(2)
    margin = chosen_reward - rejected_reward
    return {
        "loss": loss,
        "accuracy": pair_accuracy(chosen_reward, rejected_reward),
        "reward_margin": margin,
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
        "chosen_logprob": chosen.detach(),
        "rejected_logprob": rejected.detach(),
    }


def pair_accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the chosen answer has the higher score, 0 where the rejected one has, 0.5 in a tie. All [B]."""
    return ((chosen - rejected).sign() + 1) / 2


KlEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KlEstimator) -> Tensor:
    """Per-token estimates of KL(policy || reference) from samples of the policy. [B, T] -> [B, T].

    k1 is unbiased, k3 unbiased and never negative, k2 has a small bias (John Schulman, "Approximating KL
    Divergence", 2020).
    """
    log_ratio = logprobs - ref_logprobs
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio**2
    return torch.exp(-log_ratio) - 1 + log_ratio


def kl_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    kind: KlEstimator,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """The mean over tokens of an estimate of KL(policy || reference), with its gradient. [B, T] -> scalar.

    k3 is the last term of GRPO's objective, https://arxiv.org/abs/2402.03300 Eq. 4. k1's gradient is that of
    the log-probability: noise whose mean is 0, which holds nothing back. The log-ratio is clamped to +-20.
    """
    log_ratio = torch.where(mask.bool(), logprobs - ref_logprobs, 0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return masked_mean(
        kl_estimate(log_ratio, torch.zeros_like(log_ratio), kind), mask, denominator=denominator
    )


def kl_shaped_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    score_clip: float,
    kl_estimator: KlEstimator = "k1",
) -> Tensor:
    """A KL penalty on every token and the clipped score on the last valid one. [B] and [B, T] -> [B, T].

    `score_clip` 0 does not clip. A row without a valid token gets no reward. The rewards of a row add up to
    score - kl_coef * sum of k1, Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593), section 2; or of
    another estimate in its place.
    """
    if score_clip > 0:
        scores = scores.clamp(-score_clip, score_clip)
    rewards = torch.where(mask.bool(), -kl_coef * kl_estimate(logprobs, ref_logprobs, kl_estimator), 0)
    positions = torch.arange(mask.shape[1], device=mask.device)
    is_last = positions == (mask.sum(dim=1, keepdim=True) - 1)
    return rewards + is_last * scores.unsqueeze(1)


def advantages_and_returns(
    values: Tensor, rewards: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Advantages (GAE) and returns, https://arxiv.org/abs/1506.02438 Eq. 16. [B, T] each -> two [B, T].

    After the last valid token the value is 0 (the episode ends). Returns are advantages + values, taken
    before any whitening; both are 0 where the mask is.
    """
    mask = mask.float()
    is_followed, next_values = F.pad(mask, (-1, 1)), F.pad(values, (-1, 1))  # each column's next, 0 at last
    deltas = rewards + gamma * (next_values * is_followed) - values
    factors = gamma * gae_lambda * is_followed
    # Only what depends on the token after it is computed token by token, in rows that lie together.
    advantage, advantages = torch.zeros_like(deltas[:, 0]), []
    for delta, factor in zip(deltas.T.contiguous().flip(0), factors.T.contiguous().flip(0), strict=True):
        advantage = delta + factor * advantage
        advantages.append(advantage)
    stacked = torch.stack(advantages[::-1], dim=1) * mask
    return stacked, stacked + values * mask


def discounted_returns(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """What a token and those after it earn, 0 where the mask is. [B, T], [B, T] -> [B, T].

    With `kl_shaped_rewards` and gamma 1 this is the advantage of REINFORCE++ before it is whitened over the
    whole batch, https://arxiv.org/abs/2501.03262: the score less beta times the KL from the token on.
    """
    return advantages_and_returns(torch.zeros_like(rewards), rewards, mask, gamma=gamma, gae_lambda=1)[1]


def group_advantages(scores: Tensor, groups: Tensor, kind: Literal["rloo", "grpo"]) -> Tensor:
    """An answer's score against those of the other answers to its prompt. [B], int64 [B] -> [B].

    Rows with the same number in `groups` are answers to one prompt: at least two, in any order.
    "rloo" subtracts the mean of the others, the leave-one-out baseline of https://arxiv.org/abs/2402.14740
    (section 2, REINFORCE Leave-One-Out). "grpo" is (score - mean) / std over the group,
    https://arxiv.org/abs/2402.03300 section 4.1.2, with the population's std; equal scores give 0.
    """
    # On the CPU: there index_add adds in the order of the rows, on a GPU in another from run to run. In fp64,
    # or rounding would tell equal scores apart, and grpo enlarge it.
    exact, members = scores.detach().double().cpu(), groups.cpu().unique(return_inverse=True)[1]
    counts = members.bincount()
    assert (counts > 1).all(), "an answer has nothing to be compared with"

    def mean_of_group(x: Tensor) -> Tensor:
        return (torch.zeros(len(counts), dtype=x.dtype).index_add_(0, members, x) / counts)[members]

    distances = exact - mean_of_group(exact)
    if kind == "rloo":
        size = counts[members]
        return (distances * size / (size - 1)).to(scores)
    return (distances * torch.rsqrt(mean_of_group(distances**2) + 1e-8)).to(scores)


def policy_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """pi / pi_old per token, 1 where the mask is 0; the log-ratio is clamped to +-20. [B, T] -> [B, T]."""
    log_ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0)
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def truncated_importance_weights(
    logprobs: Tensor, sampled_logprobs: Tensor, mask: Tensor, *, cap: float
) -> Tensor:
    """min(pi / pi_sampled, cap) per token, 1 where the mask is 0, without gradient. All [B, T].

    For tokens that another engine sampled than the one that trains: Yao et al. 2025, "Your Efficient RL
    Framework Secretly Brings You Off-Policy RL Training", with `logprobs` those of the trained policy before
    its update. The truncation bounds the variance as in IMPALA, https://arxiv.org/abs/1802.01561 section 4.1.
    """
    return policy_ratio(logprobs, sampled_logprobs, mask).clamp(max=cap).detach()


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ratio_clip: float,
    ratio_clip_high: float | None = None,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """PPO's pessimistic policy loss, https://arxiv.org/abs/1707.06347 Eq. 7. All [B, T] -> scalar.

    The ratio is clipped to [1 - ratio_clip, 1 + ratio_clip_high], by default the same on both sides; another
    upper clip is DAPO's Clip-Higher, https://arxiv.org/abs/2503.14476. `dual_clip` c > 1 bounds the loss of a
    token of negative advantage by -c A, which has no bound otherwise: https://arxiv.org/abs/1912.09729.
    `weights` multiply the tokens' losses last.
    """
    ratio = policy_ratio(logprobs, old_logprobs, mask)
    high = ratio_clip if ratio_clip_high is None else ratio_clip_high
    clipped_ratio = ratio.clamp(1 - ratio_clip, 1 + high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    if weights is not None:
        loss = weights * loss
    return masked_mean(loss, mask, denominator=denominator)


def text_loss(logprobs: Tensor, *, denominator: float | Tensor) -> Tensor:
    """The negative log-likelihood of text, summed over its tokens and over `denominator`: [B, L] -> scalar.

    The last term of InstructGPT's objective, https://arxiv.org/abs/2203.02155 Eq. 2.
    """
    return -logprobs.sum() / denominator


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    value_clip: float,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Half the squared error of the value, or of the value clipped around its old one where that is worse.

    OpenAI baselines' ppo2; detail 9 of https://arxiv.org/abs/2403.17031. All [B, T] -> scalar.
    """
    clipped_values = old_values + (values - old_values).clamp(-value_clip, value_clip)
    loss = 0.5 * torch.maximum((values - returns) ** 2, (clipped_values - returns) ** 2)
    return masked_mean(loss, mask, denominator=denominator)
