"""Engines in files: what fp16 adds, and a disk without room. tests/test_resume.py has whole runs."""

import json
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from processes import ROOT, python

from dschat.checkpoints.engine_state import Writer


@pytest.mark.skipif(not get_accelerator().is_fp16_supported(), reason="this machine has no fp16")
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_loss_scale_goes_on_where_it_was(ranks, tmp_path):
    python(ROOT / "tests" / "workers" / "fp16_resume.py", tmp_path / "seen.json", ranks=ranks)
    for stage, run in json.loads((tmp_path / "seen.json").read_text()).items():
        assert run["rest"] == run["whole"][-len(run["rest"]) :], stage
        scales = [state["scale"] for state in run["whole"]]
        assert scales[1] in (2**16, 2**15), stage
        assert scales[-1] < scales[1], stage  # so that a fresh scaler would have shown
        assert run["whole"][-1]["weights"] != run["whole"][0]["weights"], stage


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_full_disk_is_called_one(tmp_path):
    (tmp_path / "states.pt").symlink_to("/dev/full")
    writer = Writer(None)
    writer.save({"weights": torch.ones(100_000)}, str(tmp_path / "states.pt"))
    assert "No space left on device" in writer.problem
