"""The parts of benchmarks/faults.py and benchmarks/soak.py that need no run."""

import json
import sys

import pytest
from processes import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import faults
import soak

from dschat.arguments import parse_arguments

STEPS = {faults.SFT: "sft", faults.REWARD: "reward", faults.DPO: "dpo", faults.PPO: "rlhf"}


@pytest.mark.parametrize("case", faults.CASES, ids=lambda case: case.name)
def test_the_flags_of_every_case_exist(case, tmp_path):
    command = faults.command(case, tmp_path / "out", tmp_path)
    args = parse_arguments(STEPS[case.program], command[command.index(case.program) + 1 :])
    assert args.run.save_interval > 0
    if case.program == faults.PPO:
        assert args.updates_per_ppo_step == faults.UPDATES_PER_PPO_STEP


def test_the_flags_of_the_soak_exist():
    models = ["--actor_model_name_or_path=a", "--critic_model_name_or_path=b", "--output_dir=c"]
    assert parse_arguments("rlhf", [*models, *soak.FLAGS.split()]).run.save_interval > 0


@pytest.mark.parametrize(
    ("stack", "phase"),
    [
        ('File "x/checkpoint.py", line 3 in _write\nFile "x/train.py", line 9 in train_ppo', "saving"),
        ('File "x/hf_generate.py", line 3 in generate\nFile "x/train.py", line 9 in train_ppo', "generating"),
        ('File "x/hf_generate.py", line 3\nFile "x/evaluation.py", line 9 in evaluate', "evaluating"),
        ('File "x/step.py", line 3 in train_on\nFile "x/loop.py", line 9', "training"),
        ('File "x/importlib.py", line 3', "starting"),
    ],
)
def test_a_stack_tells_what_was_going_on(stack, phase):
    assert faults.phase_of(stack) == phase


def test_the_files_that_tell_a_phase_exist():
    named = [word for _, words in faults.PHASES for word in words if word.endswith(".py")]
    assert [name for name in named if not list((ROOT / "dschat").rglob(name))] == []


def test_a_line_that_was_being_written_is_no_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 1}\n{"step": 4, "lo')
    assert faults.last_step(tmp_path) == 3


def test_the_step_that_a_run_went_on_from():
    assert faults.resumed_step("x\ngoing on from checkpoint a/checkpoints/step_00000012\ny") == 12
    assert faults.resumed_step("starting from the beginning") == 0


def test_when_steps_ended_stands_beside_the_output(tmp_path):
    assert faults.ended_steps(tmp_path / "run") == {}
    (tmp_path / "run.steps").write_text("12.5 1\n13.25 2\n")
    assert faults.ended_steps(tmp_path / "run") == {1: 12.5, 2: 13.25}


def result(kind: str, **more) -> dict:
    fine = {"case": faults.CASES[0].name, "phase": "saving", "steps lost": 2, "equal": True, "amiss": False}
    return {"signal": kind, **fine, **more}


def test_the_report_counts_what_is_amiss(capsys):
    kills = [result("SIGKILL", **{"one rank alone": True}), result("SIGKILL")]
    term = result("SIGTERM", **{"whole": True, "seconds": 1.25, "steps lost": 0})
    assert faults.report([*kills, term]) == 0
    told = capsys.readouterr().out
    for part in ("2 SIGKILLs: 2 resumed to equal weights and metrics", "1 of one rank alone", "4 optimiser"):
        assert part in told
    assert "1 in training, of which 1 left a whole checkpoint" in told
    assert faults.report([*kills, term | {"equal": False, "amiss": True}]) == 1


def test_equal_outcomes_leave_time_and_memory_aside(tmp_path):
    found = []
    for seconds in (1, 2):
        folder = tmp_path / str(seconds)
        (folder / "actor").mkdir(parents=True)
        (folder / "actor" / "model.safetensors").write_bytes(b"weights")
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2, "seconds_x": seconds}))
        (folder / "summary.json").write_text(json.dumps({"loss": 2, "seconds": seconds}))
        found.append(faults.outcome(folder))
    assert found[0] == found[1]
    (folder / "actor" / "model.safetensors").write_bytes(b"other")
    assert faults.differences(found[0], faults.outcome(folder)) == ["weights"]


def test_growth_is_told_after_the_warm_up(capsys):
    flat = [{"seconds": t, "rank": 0, "memory_mib": 100 + 50 * (t < 10), "open_files": 9} for t in range(100)]
    assert soak.report(flat) == 0
    growing = [sample | {"memory_mib": 100 + sample["seconds"] / 10} for sample in flat]
    assert soak.report(growing) == 1
    assert "rank 0 memory_mib" in capsys.readouterr().out
