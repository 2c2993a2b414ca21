"""The speed of a device: measured once, then remembered."""

from tiny import tiny_config

from dschat.planning import rates
from dschat.planning.rates import rates_of
from dschat.runs.measured_choices import MeasuredChoices


def test_rates_are_measured_once_and_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "COPIED", {"cpu": 2**12})
    monkeypatch.setattr(rates, "STEPPED", {"cpu": 2**10})
    choices, config = MeasuredChoices(folder=tmp_path), tiny_config("llama", 384)
    assert rates_of(config, "fp32", num_tokens=8, choices=choices, measures=False) is None
    found = rates_of(config, "fp32", num_tokens=8, choices=choices, measures=True)
    assert found is not None
    assert all(value > 0 for value in vars(found).values())
    assert rates_of(config, "fp32", num_tokens=8, choices=choices, measures=False) == found
