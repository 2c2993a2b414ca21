"""What a pipeline writes at its end."""

import json
import subprocess
from types import SimpleNamespace

from scripts import compare, e2e_reports


def test_the_comparison_asks_as_step_3_sampled_and_its_failure_is_said(tmp_path, monkeypatch, capsys):
    started = []

    def run(command, check):
        started.append(command)
        return SimpleNamespace(returncode=2)

    monkeypatch.setattr(subprocess, "run", run)
    e2e_reports.compare_actors(tmp_path, 8)
    assert started == []  # nothing is there
    for name in ("step1_sft", "step2_reward", "step3_ppo/actor"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
    rollout = {"temperature": 0.7, "top_k": 5, "max_answer_seq_len": 33, "print_answers": True}
    (tmp_path / "step3_ppo" / "arguments.json").write_text(json.dumps({"rollout": rollout}))
    e2e_reports.compare_actors(tmp_path, 8)
    args = compare.parse(started[0][2:])
    assert (args.temperature, args.top_k, args.max_answer_seq_len, args.num_prompts) == (0.7, 5, 33, 8)
    assert args.models["PPO"] == str(tmp_path / "step3_ppo" / "actor")
    assert args.reward_model == [str(tmp_path / "step2_reward")]
    assert "the comparison ended with exit code 2: " in capsys.readouterr().out


def test_the_report_is_written_or_that_it_was_not_is_said(tmp_path, capsys):
    e2e_reports.report_on(tmp_path)
    assert "no report on the steps: " in capsys.readouterr().out
    (tmp_path / "step1_sft").mkdir()
    (tmp_path / "step1_sft" / "training.log").write_text("error: x\n")
    e2e_reports.report_on(tmp_path)
    assert "error: x" in (tmp_path / "report.html").read_text()
