"""The page about a run: of finished, running, failed and damaged ones, in a browser."""

import json
from pathlib import Path

import pytest

from dschat.errors import UserError
from scripts import report
from scripts.report_runs import find_runs

HOSTILE = "<script>document.title = 'owned'</script>"


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A pipeline whose step 1 finished, whose step 2 finished with a bad verdict, whose step 3 was killed."""
    root = tmp_path_factory.mktemp("pipeline")
    sft, reward, ppo = (root / name for name in ("step1_sft", "step2_reward", "step3_ppo"))
    for folder, group in ((sft, "sft"), (reward, "reward"), (ppo, "ppo")):
        folder.mkdir()
        data = {"data_path": ["a.jsonl", HOSTILE], "data_split": "2,4,4", "eval_fraction": 0.05}
        (folder / "arguments.json").write_text(json.dumps({"data": data, group: {}, "run": {"seed": 1}}))
    (sft / "summary.json").write_text(json.dumps({"eval_loss": 1.25, "seconds": 12.0}))
    (sft / "started.json").write_text(
        json.dumps({"command": "dschat sft --x", "versions": {"torch": "2.13"}})
    )
    lines = [
        {"step": step, "loss": 3 - step / 50, "grad_norm": 1.0, "seconds_data": 0.5} for step in range(1, 90)
    ]
    write_lines(sft / "metrics.jsonl", [*lines, {"step": 90, "eval_loss": 1.25, "of_another_version": 7.0}])
    plan = {"device_peak": 2e9, "seconds": {"data": 0.25}, "measured": {"device_peak": 3e9}}
    (sft / "plan.json").write_text(json.dumps(plan))
    (reward / "summary.json").write_text(json.dumps({"verdict": "worse than chance: 0.3 of 100 pairs"}))
    (ppo / "forecast.json").write_text(json.dumps({"verdict": "not worth PPO, R.", "is_worth_it": False}))
    lines = [{"step": step, "score": 1.0, "k3": None if step == 2 else -1.0} for step in range(1, 9)]
    (ppo / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "sco'
    )
    (ppo / "log.txt").write_text(
        f"WARNING: {HOSTILE}\nWARNING: {HOSTILE}\n 10%|#\r 90%|#########\nnote: n\nRuntimeError: boom\n"
    )
    answer = {"prompt": "Hi", "answer": HOSTILE, "score": 1.5, "kl": 0.25, "length": 9}
    write_lines(ppo / "samples.jsonl", [{"step": step, **answer} for step in (1, 4, 8)])
    sample = {"prompt": "P", "answers": {"SFT": "old", "PPO": "new"}}
    (root / "comparison.json").write_text(
        json.dumps(
            {
                "verdicts": ["PPO is worse than SFT: wins 20.0% against SFT by r"],
                "figures": {},
                "samples": [sample],
                "prompts": {"number": 1, "which": "held out", "warnings": ["careful"]},
            }
        )
    )
    report.main([str(root)])
    return root


def test_the_page_tells_what_each_step_came_to(pipeline):
    html = (pipeline / "report.html").read_text()
    assert "<script" not in html
    for text in (
        "<b>Supervised fine-tuning has finished</b>eval_loss 1.25",
        "<b>Reward model: worse than chance</b>0.3 of 100 pairs",
        "<b>The forecast before PPO</b>not worth PPO, R.",
        "<b>PPO has not finished</b>the last metrics are of step 8: RuntimeError: boom",
        "<b>PPO is worse than SFT</b>wins 20.0%",
        "careful",
        "dschat sft --x",
        "(2 times)",
        "k3 ends at -1; healthy is",
        "answer of PPO step 8",
        "score 1.5, kl 0.25, length 9",
        "of_another_version",
    ):
        assert text in html, text
    assert "answer of PPO step 4" not in html
    rows = 'data, seconds a step</td><td class="number">0.25</td><td class="number">0.5'
    assert rows in html
    assert 'peak memory, GB</td><td class="number">2.00</td><td class="number">3.00' in html
    assert [run.step for run in find_runs(pipeline)] == ["sft", "reward", "rlhf"]


def test_in_a_browser_it_asks_for_nothing_and_fits_a_phone(browser, pipeline):
    browser.check(pipeline / "report.html", "report")


def test_half_a_run_and_none(tmp_path):
    with pytest.raises(UserError, match="holds no run: neither it nor a folder in it has an"):
        report.main([str(tmp_path)])
    (tmp_path / "step1_sft").mkdir()
    (tmp_path / "step1_sft" / "training.log").write_text(
        "python main.py\nerror: --data_path x: no such file\n"
    )
    report.main([str(tmp_path), "--html", str(tmp_path / "r.html")])
    html = (tmp_path / "r.html").read_text()
    assert (
        "Supervised fine-tuning has not finished</b>it has no metrics: error: "
        '<span class="flag">--data_path</span> x: no such file'
    ) in html
    (tmp_path / "step1_sft" / "arguments.json").write_text('{"data": ')
    (tmp_path / "step1_sft" / "summary.json").write_text("[]")
    (tmp_path / "step1_sft" / "plan.json").write_text("7")
    report.main([str(tmp_path)])
