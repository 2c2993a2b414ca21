"""What a run says of its speed."""

import pytest
import torch
from transformers import OPTConfig

from dschat.engines import speed
from dschat.engines.speed import Peak, SpeedReport, StepTimes, measured_peak
from dschat.runs.measured_choices import MeasuredChoices


def test_the_phases_of_a_step_add_up(monkeypatch):
    moments = iter([10.0, 11.0, 13.0, 13.5, 14.5, 15.0, 18.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(moments))
    times = StepTimes()
    for phase in ("data", "forward_backward", "optimizer", "forward_backward", "optimizer"):
        times.end_of(phase)
    assert times.take() == {"data": 1.0, "forward_backward": 3.0, "optimizer": 1.0}
    times.end_of("saving")
    assert times.take() == {"saving": 3.0}


def test_rates_are_of_the_step_and_lines_of_what_is_between_them(capsys):
    now = [0.0]
    report = SpeedReport(Peak(1e12), clock=lambda: now[0])
    seconds = {"data": 0.5, "forward_backward": 1.5, "evaluation": 2.0}
    figures = report.figures(tokens=600.0, flops=1e12, seconds=seconds)
    assert figures == {
        "seconds_data": 0.5,
        "seconds_forward_backward": 1.5,
        "seconds_evaluation": 2.0,
        "tokens_per_second": 300.0,
        "flops_per_second": 0.5e12,
        "peak_share": 0.5,
    }
    report.print_now_and_then(1)
    assert capsys.readouterr().out == ""
    now[0] = 61.0
    report.print_now_and_then(2)
    told = (
        "300 tokens/s, 0.5 TFLOP/s, 50% of the peak; time: data 12%, forward and backward 38%, evaluation 50%"
    )
    assert capsys.readouterr().out == f"step 2: {told}\n"
    report.print_now_and_then(3, is_last=True)  # no step since
    assert capsys.readouterr().out == ""
    report.figures(tokens=100.0, flops=1e11, seconds={"data": 1.0})
    report.print_now_and_then(4, is_last=True)
    assert capsys.readouterr().out.startswith("step 4: 100 tokens/s, 0.1 TFLOP/s, 10% of the peak")


def test_a_peak_that_a_step_exceeds_is_timed_again_once_and_no_share_is_above_it(capsys):
    peak = Peak(100e12, again=iter([150e12]).__next__)
    assert peak.share(120e12) == 0.8
    assert capsys.readouterr().out == (
        "peak: a step computed 120 TFLOP/s, so the peak was timed again: 150\n"
    )
    assert [peak.share(flops) for flops in (200e12, 150e12)] == [1.0, 0.75]
    assert Peak(1.0, again=lambda: 0.5).share(2e12) == 1.0
    assert capsys.readouterr().out.endswith("timed again: 1e-12; the fastest step stands for it\n")


def test_the_peak_is_measured_in_the_models_shapes_and_leaves_random_numbers_alone(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(speed.OPERATIONS_TIMED, "cpu", 1e8)
    choices = MeasuredChoices(folder=tmp_path)
    state = torch.get_rng_state()
    config = OPTConfig(hidden_size=64, ffn_dim=128, num_attention_heads=2)
    peak = measured_peak(config, "fp32", num_tokens=1000, choices=choices)
    assert torch.equal(torch.get_rng_state(), state)
    assert "fp32 products of 1024 x 64 x 128" in capsys.readouterr().out
    assert peak.flops > 1e6
    # The machine remembers it, so that shares of one machine compare.
    again = measured_peak(config, "fp32", num_tokens=900, choices=MeasuredChoices(folder=tmp_path))
    assert again.flops == peak.flops
    other = measured_peak(config, "bf16", num_tokens=900, choices=choices)
    assert other.flops != pytest.approx(peak.flops, rel=1e-9)
    assert peak.again() >= peak.flops
