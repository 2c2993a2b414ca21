"""The examples learn what they say."""

from pathlib import Path

import pytest

from examples import ppo_minimal


@pytest.mark.slow
def test_ppo_on_one_page_learns_to_count(monkeypatch, capsys):
    monkeypatch.setattr(ppo_minimal, "STEPS", 31)
    curve = ppo_minimal.train()
    assert curve[0] < 0.1
    assert curve[30] > 0.3
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("step   0  score 0.0")
    assert "KL per token 0.000" in first


def test_it_is_one_page():
    assert len(Path(ppo_minimal.__file__).read_text(encoding="utf-8").splitlines()) < 150
