"""PPO in NumPy, from the papers' formulas and from nothing of dschat: one answer at a time, no padding.

An answer's numbers are arrays [n] of its own length. arXiv: PPO 1707.06347; GAE 1506.02438; Ziegler et al.
1909.08593; dual clip 1912.09729; RLOO 2402.14740; GRPO 2402.03300; REINFORCE++ 2501.03262. Yao et al.: "Your
Efficient RL Framework Secretly Brings You Off-Policy RL Training" (2025).
"""

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


def rewards(score: float, logprobs: Numbers, ref_logprobs: Numbers, beta: float) -> Numbers:
    """R(x, y) = r(x, y) - beta log(pi(y|x) / rho(y|x)), Ziegler et al. Eq. 2, each token paying its own."""
    result = -beta * (logprobs - ref_logprobs)
    result[-1] += score
    return result


def gae(values: Numbers, rewards: Numbers, gamma: float, lam: float) -> Numbers:
    """A_t = sum over l of (gamma lambda)^l delta_(t+l), GAE Eq. 16, delta_t = r_t + gamma V_(t+1) - V_t."""
    n = len(rewards)
    following = np.append(values[1:], 0.0)
    delta = rewards + gamma * following - values
    return np.array([sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)])


def whitened(advantages: list[Numbers]) -> list[Numbers]:
    """Mean 0 and variance 1 over the tokens of all answers."""
    together = np.concatenate(advantages)
    return [(a - together.mean()) / together.std() for a in advantages]


def rewards_to_go(rewards: Numbers) -> Numbers:
    """REINFORCE++: r(x, y) - beta sum of KL(i) over i from t to T."""
    return np.array([rewards[t:].sum() for t in range(len(rewards))])


def rloo(scores: Numbers) -> Numbers:
    """R_i - 1 / (k - 1) times the sum of the other R_j, for one prompt's answers."""
    k = len(scores)
    return np.array([scores[i] - sum(scores[j] for j in range(k) if j != i) / (k - 1) for i in range(k)])


def grpo(scores: Numbers) -> Numbers:
    """(r_i - mean(r)) / std(r), for one prompt's answers."""
    return (scores - scores.mean()) / scores.std()


def policy_objective(
    ratio: float, advantage: float, low: float, high: float, dual: float | None = None
) -> float:
    """min(r A, clip(r, 1 - low, 1 + high) A), PPO Eq. 7, to be maximised; where A < 0 at least dual x A."""
    objective = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    if dual is not None and advantage < 0:
        objective = max(objective, dual * advantage)
    return objective


def truncated_weight(learner: float, sampler: float, cap: float) -> float:
    """min(pi_learner(a) / pi_sampler(a), C), Yao et al., of two log-probabilities."""
    return min(np.exp(learner) / np.exp(sampler), cap)


def policy_loss(
    logprobs: list[Numbers],
    old: list[Numbers],
    advantages: list[Numbers],
    low: float,
    high: float,
    dual: float | None,
    sampled: list[Numbers] | None = None,
    cap: float = 1.0,
) -> float:
    """Minus the mean objective over the tokens of all answers, each weighed where `sampled` is given."""
    objectives = [
        truncated_weight(old_t, sampled_t, cap)
        * policy_objective(np.exp(new_t - old_t), a_t, low, high, dual)
        for answer in zip(logprobs, old, advantages, old if sampled is None else sampled, strict=True)
        for new_t, old_t, a_t, sampled_t in zip(*answer, strict=True)
    ]
    return -float(np.mean(objectives))


def value_loss(values: list[Numbers], old: list[Numbers], returns: list[Numbers], clip: float) -> float:
    """Half the mean of max((V - R)^2, (V_old + clip(V - V_old) - R)^2) over the tokens of all answers."""
    errors = []
    for answer in zip(values, old, returns, strict=True):
        for v, v_old, r in zip(*answer, strict=True):
            bounded = v_old + min(max(v - v_old, -clip), clip)
            errors.append(max((v - r) ** 2, (bounded - r) ** 2))
    return 0.5 * float(np.mean(errors))


def kl_loss(logprobs: list[Numbers], ref_logprobs: list[Numbers]) -> float:
    """The mean of pi_ref / pi - log(pi_ref / pi) - 1 over the tokens of all answers, GRPO Eq. 4."""
    ratio = np.exp(np.concatenate(ref_logprobs) - np.concatenate(logprobs))
    return float(np.mean(ratio - np.log(ratio) - 1))
