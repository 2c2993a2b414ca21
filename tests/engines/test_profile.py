"""A profile begins and ends where --profile says, and its page names what costs most."""

import gzip
import json

import pytest
import torch

from dschat.arguments import RunArguments
from dschat.engines.profile import StepProfiler, advice

FIGURES = {
    "loss": 1.0,
    "seconds_data": 0.1,
    "seconds_forward_backward": 0.3,
    "tokens_per_second": 1500.0,
    "flops_per_second": 2e12,
    "peak_share": 0.25,
}


def run(tmp_path, steps: str | None, *, first: int = 0, last: int = 6) -> list[int]:
    """The steps in which torch's profiler was on, of a run from `first` to `last`."""
    profiler, profiled = StepProfiler(RunArguments(output_dir=str(tmp_path), profile=steps)), []
    profiler.after_step(first)
    for step in range(first + 1, last + 1):
        if torch.autograd._profiler_enabled():
            profiled.append(step)
        torch.ones(64, 64) @ torch.ones(64, 64)
        profiler.after_step(step, FIGURES)
    profiler.close(last)
    assert not torch.autograd._profiler_enabled()
    return profiled


@pytest.mark.parametrize(
    ("steps", "first", "profiled"),
    [
        (None, 0, []),
        ("3-5", 0, [3, 4, 5]),
        ("1", 0, [1]),
        ("5-9", 0, [5, 6]),
        ("2-4", 2, [3, 4]),
        ("2", 3, []),
    ],
)
def test_the_profiler_is_on_in_those_steps_alone(steps, first, profiled, tmp_path):
    assert run(tmp_path, steps, first=first) == profiled
    assert (tmp_path / "profile" / "summary.md").exists() == bool(profiled)


def test_a_profile_is_a_trace_and_a_page(tmp_path, capsys):
    run(tmp_path, "2-3")
    with gzip.open(tmp_path / "profile" / "trace.json.gz") as file:
        assert any(event.get("name") == "aten::mm" for event in json.load(file)["traceEvents"])
    page = (tmp_path / "profile" / "summary.md").read_text()
    assert page.startswith("# Profile of steps 2 to 3\n")
    assert "1,500 tokens/s, 2 TFLOP/s of the model, 25.0% of the measured peak." in page
    assert "| data | 0.1000 | 25% |" in page
    assert "| `aten::mm` | 2 |" in page
    assert "data take 25% of a step" in page
    assert [path.name for path in (tmp_path / "profile").iterdir() if path.suffix == ".json"] == []
    assert "profile of steps 2 to 3" in capsys.readouterr().out


def test_every_rank_has_a_trace_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run(tmp_path, "2")
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["trace_rank1.json.gz"]


def test_a_run_without_the_steps_of_its_profile_says_so(tmp_path, capsys):
    assert run(tmp_path, "8-9") == []
    assert "the run went on to step 6 without steps 8 to 9: no profile." in str(capsys.readouterr())
    assert run(tmp_path, "2", first=3) == []  # resumed
    assert "--profile: the run went on to step 6 without step 2: no profile." in str(capsys.readouterr())
    assert run(tmp_path, "2") == [2]
    capsys.readouterr()
    assert run(tmp_path, "2", first=3) == []  # resumed after its profile
    assert "no profile" not in str(capsys.readouterr())


def test_advice_is_of_what_is_large():
    shares = {"products": 0.4, "attention": 0.1, "copies": 0.3, "waits": 0.0, "num_waits": 0}
    told = " ".join(advice(shares, {"generation": 6.0, "optimizer": 3.0, "saving": 1.0}))
    for part in (
        "products are 40%",
        "copies and fills are 30%",
        "generation takes 60%",
        "optimiser takes 30%",
    ):
        assert part in told
    assert "evaluation" not in told
    assert "data take" not in told
