"""Frozen models whose weights are in CPU memory between uses; moves to another device are tested as calls."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dschat.engines.at_rest import RestingWeights, in_use, rest

INPUTS = torch.randn(4, 3)


@pytest.fixture
def model() -> nn.Module:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight  # tied weights stay tied
    return nn.Sequential(first, second).requires_grad_(False)


def test_a_model_computes_the_same_in_use_and_not_at_rest(model):
    expected = model(INPUTS)
    engine = SimpleNamespace(module=model, device="cpu")
    rest(engine)
    with in_use(engine) as used, in_use(engine):
        assert torch.equal(used.module(INPUTS), expected)
    with in_use(engine):
        assert torch.equal(model(INPUTS), expected)
    with pytest.raises(AssertionError, match="at rest"):
        model(INPUTS)


def test_an_engine_that_does_not_rest_is_left_alone(model):
    with in_use(SimpleNamespace(module=model)) as used:
        used.module(INPUTS)
    model(INPUTS)


def test_weights_come_for_the_outermost_use_and_go_after_it(model, monkeypatch):
    weights, moved = RestingWeights(model, torch.device("cpu")), []

    class Copied(torch.Tensor):
        def to(self, device, **options):
            assert options == {"non_blocking": True}
            moved.append(device)
            return self.as_subclass(torch.Tensor).clone()

    weights._at_rest = [(p, weight.as_subclass(Copied)) for p, weight in weights._at_rest]
    homes = [weight.data_ptr() for _, weight in weights._at_rest]
    for _ in range(2):
        with weights.in_use(), weights.in_use():
            assert all(p.data_ptr() != home for p, home in zip(model.parameters(), homes, strict=True))
        assert [p.data_ptr() for p in model.parameters()] == homes
    assert moved == [torch.device("cpu")] * 2 * len(homes)  # the tied weight once
    assert len(homes) == 3
