"""The plan beside what was measured."""

import json

import pytest
import torch
from plans import arguments, specs_of
from tiny import save_tiny_model

from dschat.distributed.device import peak_memory_gib
from dschat.planning.run_plan import PLAN, RunPlan, measured_seconds, resident_memory
from dschat.runs.measured_choices import MeasuredChoices


@pytest.fixture
def run_plan(tmp_path, capsys):
    model = save_tiny_model(tmp_path / "m")
    args = arguments("sft", f"--model_name_or_path={model}", f"--output_dir={tmp_path}")
    choices = MeasuredChoices(folder=tmp_path / "choices")
    return RunPlan.begin(args, specs_of, choices, longest=32, steps=7)


def test_a_run_says_what_was_predicted_and_what_was_measured(run_plan, tmp_path, capsys):
    lines = [{"step": n, "seconds_forward_backward": n, "seconds_optimizer": 0.5} for n in (9, 2, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "plan: would cut most: --" in capsys.readouterr().out  # however much memory there is
    run_plan.finish()
    assert "predicted" in capsys.readouterr().out
    written = json.loads((tmp_path / PLAN).read_text())
    assert written["steps"] == 7
    assert written["measured"]["seconds"] == {"forward_backward": 3.0, "optimizer": 0.5}
    assert written["measured"]["device_peak"] >= 0


def test_runs_without_metrics_have_no_seconds(tmp_path):
    assert measured_seconds(tmp_path) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the device's memory there")
def test_what_was_held_before_the_plan_is_no_part_of_the_measured_peak():
    assert torch.ones(2**28, dtype=torch.uint8).sum() == 2**28  # and gone again
    baseline = resident_memory()
    assert peak_memory_gib() * 2**30 < baseline + 2**26
