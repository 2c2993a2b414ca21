"""The pure parts of benchmarks/versus.py: its command lines, its arithmetic, its table."""

import argparse
import json
from pathlib import Path

import pytest
import versus
import versus_marks as marks
import versus_ours
import versus_report as report
import versus_setting as setting

from dschat.arguments import parse_arguments


def arguments(**changed) -> argparse.Namespace:
    given = {
        "folder": Path("/f"), "hh_data": Path("/hh.jsonl"), "share": 1.0, "our_flags": "", "before": None,
        "trl_python": None, "trl_ppo_python": None, "peer": [], "rounds": 1, "threads": 2, "timeout": 60.0,
    }  # fmt: skip
    return argparse.Namespace(**given | changed)


@pytest.mark.parametrize("workload", setting.WORKLOADS.values(), ids=lambda w: w.name)
def test_every_workload_is_a_command_line_that_its_step_accepts(workload):
    flags = setting.our_flags(workload, Path("/f"), Path("/hh.jsonl"), 4)
    args = parse_arguments(workload.step, flags)
    assert args.run.dtype == "bf16"
    assert 1 <= workload.left_out < workload.num_steps
    if workload.step != "rlhf":
        epochs = args.optimizer.num_train_epochs
        assert round(epochs * workload.num_steps) == 4, "a part of the epoch whose rows are prepared"
        assert args.data.max_train_samples == workload.num_rows


def timed(*moments: tuple[float, float], samples: int = 8, left_out: int = 1) -> marks.Marks:
    return marks.Marks(left_out, list(moments), [samples] * len(moments), [100] * len(moments), 5.0)


def test_the_first_steps_are_not_timed(monkeypatch):
    monkeypatch.setenv(marks.STARTED, "90")
    found = timed((100, 50), (102, 51), (104, 52)).report(phases={})
    assert found["samples_per_second"] == pytest.approx(16 / 4)
    assert found["samples_per_cpu_second"] == pytest.approx(16 / 2)
    assert found["tokens_per_second"] == pytest.approx(200 / 4)
    assert found["first_step_seconds"] == 10
    assert found["training_peak_mib"] == 5.0


def test_a_run_without_a_step_to_time_has_no_report():
    with pytest.raises(ValueError, match="1 steps were taken and the first 1"):
        timed((100, 50)).report()


def test_the_last_line_that_is_an_object_is_the_report():
    assert marks.last_json_line('{"a": 1}\n{"b": 2}\n[3]\n{broken\nbye') == {"b": 2}
    with pytest.raises(ValueError, match="no line"):
        marks.last_json_line("bye")


def test_the_median_of_an_even_number_is_between_the_two():
    assert marks.median([3, 1, 2]) == 2
    assert marks.median([1, 4, 3, 2]) == 2.5


def test_phases_are_medians_of_the_steps_that_are_timed():
    logged = [{"step": n, "seconds_generation": n, "loss": 1.0} for n in (1, 2, 3, 4)]
    assert versus_ours.phases(logged, 1) == {"seconds_generation": 3}


def test_a_peer_s_command_gets_its_places():
    args = arguments(peer=["P=tool {workload} --rows {rows} --batch {batch} {steps}"])
    name, command, _ = versus.competitors(args, setting.WORKLOADS["reward"], Path("/o"))[-1]
    assert (name, command) == ("P", ["tool", "reward", "--rows", "/f/pairs.jsonl", "--batch", "8", "20"])


def test_a_peer_without_its_python_is_not_run_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(versus, "timed_run", lambda *_: ({"samples_per_second": 4.0}, ""))
    not_run: dict[str, str] = {}
    args = arguments(folder=tmp_path, peer=["P=tool"])
    found = versus.run_workload(args, setting.WORKLOADS["sft"], not_run)
    assert not_run == {"sft: TRL": "no --trl-python", "sft: TRL packing": "no --trl-python"}
    assert sorted(found) == ["P", "ours"]


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["sh", "-c", 'echo \'{"skip": "it has no PPO"}\'; exit 1'], "it has no PPO"),
        (["sh", "-c", "exit 3"], "no line that is a JSON object"),
        (["/no/such/python"], "FileNotFoundError"),
    ],
)
def test_a_command_that_fails_is_not_run_with_its_reason(tmp_path, command, reason):
    found, said = versus.timed_run(arguments(), command, tmp_path / "logs" / "log.txt")
    assert found is None
    assert reason in said


def runs(rate: float, memory: float) -> list[dict]:
    more = {"peak_mib": memory, "training_peak_mib": memory - 9, "first_step_seconds": 3.5, "phases": {}}
    return [{"samples_per_second": rate * f, "samples_per_cpu_second": rate, **more} for f in (0.9, 1.0, 1.1)]


def results() -> dict:
    return {
        "threads": 2, "rounds": 3, "minutes": 2.0, "command": "python benchmarks/versus.py", "versions": {},
        "setting": {"parameters": {"6m": 6050304}, "mean_tokens": {"sft": 137.9}},
        "not_run": {"ppo: TRL": "no --trl-ppo-python"},
        "runs": {
            "sft": {"ours": runs(60, 900), "TRL": runs(20, 1400), "TRL packing": runs(40, 800)},
            "rollout": {"batch": 32, "chosen": "static",
                        "ms_per_step": {"static": [7.0], "generate()": [14.0], "hand-written loop": [5.0]}},
            "start": {"step1_sft/main.py": [0.3], "step3_ppo/main.py": [0.5], "trl sft": [4.0]},
        },
    }  # fmt: skip


def test_the_table_shows_medians_with_spread_and_the_goals():
    text = report.report(results())
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert lines["SFT, samples/s"] == (
        "| SFT, samples/s | 60.0 (54.0 to 66.0) | 20.0 (18.0 to 22.0) | 40.0 (36.0 to 44.0) "
        "| 3.00 of 3 times TRL: met; 1.50 of 2 times TRL packing: **not met** |"
    )
    rollout = lines["rollout of 32, ms a decode step"]
    assert "2.00 of 2 times generate(): met; 1.40 of at most 1.3 of the loop: **not met**" in rollout
    assert "1.12 of at most 1 time the leanest peer: **not met**" in lines["peak memory, MiB, SFT"]
    assert "3.5 of under 4 s: met" in lines["command to first step, s, SFT"]
    assert "0.40 of under 1 s: met" in lines["--help, s"]
    assert "- ppo: TRL: no --trl-ppo-python" in text


def test_every_goal_names_a_workload_and_is_reported_once():
    assert {goal.workload for goal in report.SPEED_GOALS} <= set(setting.WORKLOADS)
    assert len(set(report.SPEED_GOALS)) == len(report.SPEED_GOALS)


def test_with_one_thread_rates_are_of_processor_time():
    found = runs(60, 900)
    assert report.rates({"ours": found}, "ours", 1) == [60, 60, 60]
    assert json.dumps(report.rates({"ours": [{"samples_per_second": 5.0}]}, "ours", 1)) == "[5.0]"
