"""What steps 1, 2 and DPO say of their speed."""

from types import SimpleNamespace

import pytest
import torch

from dschat.arguments import BatchArguments, RunArguments
from dschat.data.token_batch import TokenBatch
from dschat.engines.model_work import ModelWork
from dschat.engines.speed import Peak
from dschat.supervised import speed
from dschat.supervised.speed import Speed


@pytest.fixture
def meter(monkeypatch):
    """Of a model of 10 weights without a head and without attention, on a machine of 1,000 FLOP/s."""
    monkeypatch.setattr(speed, "measured_peak", lambda *args, **kwargs: Peak(1000.0))
    sizes = ModelWork(body=10, trained_body=10, head=0, trained_head=0, attention=0)
    monkeypatch.setattr(speed.ModelWork, "of", staticmethod(lambda model: sizes))
    engine = SimpleNamespace(module=SimpleNamespace(config=None))
    settings = SimpleNamespace(batch=BatchArguments(), run=RunArguments())
    return Speed(engine, SimpleNamespace(longest_row=9), settings, SimpleNamespace(choices=None))


def test_real_tokens_are_counted_and_taken_out_of_the_metrics(meter):
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])  # the second row is a filler
    tokens = TokenBatch.of(torch.ones_like(mask), mask.bool(), attention_mask=mask)
    counting = meter.counting(lambda batch: {"loss": torch.tensor(2.0)})
    counted = counting(SimpleNamespace(tokens=tokens))
    assert {name: float(value) for name, value in counted.items()} == {
        "loss": 2.0,
        "rows_tokens": 3.0,
        "rows_squares": 9.0,
        "rows_labels": 2.0,
    }


def test_rates_are_of_what_was_counted(meter, monkeypatch):
    monkeypatch.setattr(meter._times, "take", lambda: {"data": 0.5, "optimizer": 1.5, "saving": 7.0})
    trained = {"loss": 2.0, "rows_tokens": 4.0, "rows_squares": 10.0, "rows_labels": 2.0}
    figures = meter.figures(trained)
    assert trained == {"loss": 2.0}
    assert figures["tokens_per_second"] == 2.0
    assert figures["flops_per_second"] == 6 * 10 * 4 / 2
    assert figures["peak_share"] == pytest.approx(0.12)
    assert figures["seconds_saving"] == 7.0
    assert figures["seconds_evaluation"] == 0.0
