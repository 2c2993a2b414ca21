"""What PPO says of its speed."""

from types import SimpleNamespace

import pytest
import torch

from dschat.arguments import PpoArguments, RolloutArguments, RunArguments
from dschat.engines.speed import Peak
from dschat.rlhf import speed
from dschat.rlhf.speed import PpoSpeed


@pytest.fixture
def trainer(monkeypatch):
    """A trainer that has sampled 10 tokens, of which a PPO step needs 600 operations."""
    monkeypatch.setattr(speed, "measured_peak", lambda *args, **kwargs: Peak(1000.0))
    monkeypatch.setattr(
        speed, "PpoWork", lambda *args: SimpleNamespace(flops=lambda *args, **kwargs: 600.0 * share(kwargs))
    )
    rollout = SimpleNamespace(attention_mask=torch.ones(2, 5))
    module = SimpleNamespace(config=None)
    return SimpleNamespace(
        engine=SimpleNamespace(actor=SimpleNamespace(module=module)),
        updates_per_ppo_step=4,
        experience=SimpleNamespace(rollout=rollout, ppo_step=0),
    )


def share(kwargs: dict) -> float:
    return kwargs["share_of_updates"]


def test_rates_are_of_the_phases_and_saving_is_no_part_of_them(trainer, monkeypatch):
    args = SimpleNamespace(ppo=PpoArguments(), rollout=RolloutArguments(), run=RunArguments())
    meter = PpoSpeed(trainer, args, choices=None)
    clock = iter([1.0, 8.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    with meter.saving():
        pass
    metrics = {"updates_done": 2, "seconds_generation": 1.5, "seconds_training": 0.5, "kl": 3.0}
    assert meter.figures(metrics) == {
        "seconds_generation": 1.5,
        "seconds_training": 0.5,
        "seconds_saving": 7.0,
        "tokens_per_second": 5.0,
        "flops_per_second": 150.0,  # half of the updates in 2 seconds
        "peak_share": 0.15,
    }
    assert meter.figures(metrics)["seconds_saving"] == 0
