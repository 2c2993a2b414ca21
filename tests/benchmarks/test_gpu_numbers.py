"""benchmarks/gpu_numbers.py, a CPU compared with itself."""

import math
import subprocess
import sys
from pathlib import Path

import gpu_numbers
import pytest

PROGRAM = Path(gpu_numbers.__file__)


def test_cases_have_names_of_their_own_and_name_what_they_equal():
    names = [case.name for case in gpu_numbers.cases()]
    assert len(set(names)) == len(names)
    assert {case.like for case in gpu_numbers.cases() if case.like} <= set(names)


def test_differences_are_relative_above_1_and_leave_times_out():
    ours = [{"step": 1, "loss": 0.5, "seconds_data": 1.0}, {"step": 2, "score": 11.0}]
    theirs = [{"step": 1, "loss": 0.25, "seconds_data": 9.0}, {"step": 2, "score": 10.0}]
    assert gpu_numbers.largest_difference(ours, theirs) == (0.25, "loss at 1")
    theirs[1]["score"] = 5.0
    assert gpu_numbers.largest_difference(ours, theirs) == (1.2, "score at 2")
    assert gpu_numbers.largest_difference(ours, theirs[:1])[0] == math.inf
    assert gpu_numbers.largest_difference(ours, "it failed")[0] == math.inf


@pytest.mark.slow
def test_a_run_is_recorded_compared_and_resumed_to_the_bit(tmp_path):
    def call(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(PROGRAM), "--folder", str(tmp_path), *flags]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    recorded = call("--record", str(tmp_path / "cpu.json"), "--only", "reward gpt2")
    assert recorded.returncode == 0, recorded.stderr
    compared = call("--compare", str(tmp_path / "cpu.json"), "--only", "reward gpt2")
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert "| reward gpt2 | a CPU | " in compared.stdout
    other = call("--compare", str(tmp_path / "cpu.json"), "--only", "sft opt resumed")
    assert other.returncode == 1  # nothing to compare with
    assert "| sft opt resumed | a CPU | inf | no run to compare with" in other.stdout
