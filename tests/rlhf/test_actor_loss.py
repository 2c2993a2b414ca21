import math

import pytest
import torch
from made_up_rollout import ROLLOUT

from dschat.arguments import PpoArguments
from dschat.rlhf.actor_loss import actor_loss
from dschat.rlhf.experience import MicroBatch

LOGPROBS = torch.tensor([[-1.0, -2.0], [-3.0, 9.0]])
ADVANTAGES = torch.tensor([[1.0, -2.0], [4.0, 9.0]])
BATCH = MicroBatch(ROLLOUT, LOGPROBS, LOGPROBS - math.log(2), None, ADVANTAGES, ADVANTAGES)


def loss_of(args: PpoArguments, entropy: torch.Tensor | None = None, **settings: float):
    numbers = {"kl_coef": 0.5, "num_tokens": 6, **settings}
    return actor_loss(LOGPROBS.clone().requires_grad_(), entropy, BATCH, args, **numbers)


def test_a_share_is_a_sum_over_tokens_divided_by_those_of_the_whole_step():
    # Ratios are 1: -(1 - 2 + 4) / 6; the masked advantage of 9 does not count.
    loss = loss_of(PpoArguments())
    assert loss.total.item() == pytest.approx(-0.5)
    assert list(loss.terms) == ["policy_loss"]
    assert not loss.logprobs.requires_grad


def test_the_kl_term_is_in_the_total_by_beta_and_among_the_metrics_without_it():
    # log-ratio ln 2 at each of 3 tokens: k2 is (ln 2)^2 / 2, so 3 of them over 6
    loss = loss_of(PpoArguments(kl_in="loss", kl_estimator="k2"))
    kl = 0.25 * math.log(2) ** 2
    assert loss.terms["kl_loss"].item() == pytest.approx(kl)
    assert loss.total.item() == pytest.approx(-0.5 + 0.5 * kl)


def test_entropy_is_subtracted_by_its_coefficient():
    entropy = torch.tensor([[1.0, 2.0], [3.0, 100.0]])
    assert loss_of(PpoArguments(entropy_coef=0.1), entropy).total.item() == pytest.approx(-0.5 - 0.1)


def test_the_gradient_reaches_valid_tokens_alone():
    logprobs = LOGPROBS.clone().requires_grad_()
    actor_loss(logprobs, None, BATCH, PpoArguments(), kl_coef=0.5, num_tokens=6).total.backward()
    expected = [pytest.approx(-1 / 6), pytest.approx(2 / 6), pytest.approx(-4 / 6), 0]
    assert logprobs.grad.flatten().tolist() == expected
