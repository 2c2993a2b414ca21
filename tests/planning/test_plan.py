"""The plan as a whole: what it prints, and what it writes."""

import json
from dataclasses import replace

from plans import Remembered, arguments, planned

from dschat.planning.engine_memory import Part

SECONDS = {"forward": 1.0, "forward_backward": 3.0, "optimizer": 0.5, "reading": 1.0, "writing": 0.25}
TIMED = {"choices": Remembered(SECONDS)}


def test_a_plan_tells_memory_time_and_money():
    plan = planned(arguments("rlhf"), ranks=2, memory=80e9, **TIMED, steps=3600)
    assert plan.fits
    assert plan.hours is not None
    assert plan.step_seconds is not None
    assert abs(plan.hours - plan.step_seconds) < 1e-9
    first, *_, last = plan.lines(price_per_hour=2.0)
    assert "of 79.4 GB on each of 2 x cuda to train" in first
    assert all(name in first for name in ("generate", "experience", "load", "save"))
    assert f"{4 * plan.hours:,.2f} at 2 per device and hour" in last
    assert set(plan.seconds or {}) == {"generation", "experience", "training"}


def test_a_plan_without_rates_tells_memory_alone():
    plan = planned(arguments("sft"))
    assert plan.hours is None
    assert plan.fits is None
    assert len(plan.lines()) >= 1


def test_what_is_too_large_does_not_fit():
    assert planned(arguments("sft"), memory=0.61e9).fits is False


def test_a_plan_that_hangs_on_how_malloc_fits_passes_says_at_least():
    on_cpu, on_gpu = (planned(arguments("sft"), device=kind) for kind in ("cpu", "cuda"))
    assert on_cpu.lines()[0].startswith("plan: at least 0.")
    assert "at least" not in on_gpu.lines()[0]
    heavy = (Part("model", "weights", 3e9), Part("model", "activations", 2e9), Part("model", "holes", 0.5e9))
    assert replace(on_cpu, phases={"train": heavy}).reported_peak == "5.50"


def test_a_plan_is_json():
    written = json.loads(json.dumps(planned(arguments("reward"), **TIMED, steps=5).as_json()))
    assert written["device_peak"] == max(phase["device"] for phase in written["phases"].values())
    assert {part["kind"] for part in written["phases"]["train"]["parts"]} >= {"weights", "activations"}
    assert written["seconds"]["forward_backward"] > written["seconds"]["optimizer"] > 0
