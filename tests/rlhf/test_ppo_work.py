"""The operations of a PPO step, against numbers counted by hand."""

from types import SimpleNamespace

import pytest
import torch

from dschat.arguments import PpoArguments
from dschat.engines.model_work import ModelWork
from dschat.rlhf import ppo_work
from dschat.rlhf.ppo_work import PpoWork

ROLLOUT = SimpleNamespace(
    attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]),  # 3 and 4 tokens
    answer_mask=torch.tensor([[True, False], [True, True]]),  # 3 labels
)


def work_of(monkeypatch, *roles: str, **flags) -> PpoWork:
    """Models of 10 trained weights in the body and 100 in the head, without attention."""
    sizes = ModelWork(body=10, trained_body=10, head=100, trained_head=100, attention=0)
    monkeypatch.setattr(ppo_work.ModelWork, "of", staticmethod(lambda model: sizes))
    engine = SimpleNamespace(by_role={role: SimpleNamespace(module=None) for role in roles})
    return PpoWork(engine, PpoArguments(**flags))


FORWARD = 2 * 10 * 7 + 2 * 100 * 3
"""Operations of one pass: 2 per weight and token of the body, 2 per weight and label of the head."""


def test_four_models_read_and_two_learn(monkeypatch):
    work = work_of(monkeypatch, "actor", "reference", "critic", "reward")
    # Sampling, and one pass of each of four models; forward and backward of two at three times a pass.
    expected = (1 + 4) * FORWARD + 2 * 3 * FORWARD
    assert work.flops(ROLLOUT, ppo_step=0, share_of_updates=1) == expected


@pytest.mark.parametrize(("share", "epochs"), [(0.5, 1), (1.0, 3), (0.0, 2)])
def test_updates_count_by_passes_and_by_the_share_that_was_made(monkeypatch, share, epochs):
    work = work_of(monkeypatch, "actor", "reference", "critic", "reward", ppo_epochs=epochs)
    expected = 5 * FORWARD + share * epochs * 6 * FORWARD
    assert work.flops(ROLLOUT, ppo_step=0, share_of_updates=share) == pytest.approx(expected)


def test_while_the_actor_waits_the_critic_learns_alone(monkeypatch):
    work = work_of(monkeypatch, "actor", "reference", "critic", "reward", critic_warmup_steps=2)
    assert work.flops(ROLLOUT, ppo_step=1, share_of_updates=1) == 5 * FORWARD + 3 * FORWARD
    assert work.flops(ROLLOUT, ppo_step=2, share_of_updates=1) == 5 * FORWARD + 6 * FORWARD


def test_an_actor_without_a_reference_of_its_own_is_read_twice(monkeypatch):
    work = work_of(monkeypatch, "actor", advantage_estimator="rloo")
    # Sampling, the actor, and the actor without its adapters; there is neither critic nor reward model.
    assert work.flops(ROLLOUT, ppo_step=0, share_of_updates=1) == 3 * FORWARD + 3 * FORWARD
