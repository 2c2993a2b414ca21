"""Step 3 asks whether its reward model is worth PPO before it trains."""

import json
import sys

import pytest
from processes import ROOT, python
from step_flags import rlhf
from tiny import save_counting_pairs, save_reward_model, save_tiny_model

from dschat.errors import UserError
from step3_ppo import forecast
from step3_ppo.forecast import cheap_words, check_worth

PPO = ROOT / "step3_ppo" / "main.py"
GUARD = "--guard_reward_model_name_or_path"
FAKE = """
import json, pathlib, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "crash" in sys.argv:
    sys.exit("error: no such gold")
told = {"is_worth_it": "yes" in sys.argv, "verdict": "as told", "advice": None}
if "yes" in sys.argv:
    told["advice"] = "--kl_target 0.64, and --eval_interval so small"
path = pathlib.Path(flags["--output"], "forecast.json")
path.write_text(json.dumps({**told, "argv": sys.argv[1:]}))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Ask as step 3 does, with a program of fake forecasts."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(forecast, "PROGRAM", tmp_path / "fake.py")
    monkeypatch.setattr(sys, "argv", ["main.py", "--local_rank=0", "--seed", "3"])

    def ask(words=None, *more, num_answers=100_000, held_out=500):
        asked = ["--forecast", words] if words else []
        check_worth(rlhf("--output_dir", str(tmp_path), *asked, *more), num_answers, held_out)
        path = tmp_path / "forecast.json"
        return json.loads(path.read_text())["argv"] if path.exists() else None

    return ask


def test_a_reward_model_that_is_not_worth_it_ends_the_run_unless_forced(run, tmp_path, capsys):
    with pytest.raises(
        UserError, match=r"as told \(.*forecast.html\). Nothing was trained. .* with --force."
    ):
        run("--gold_function no")
    (tmp_path / "forecast.json").unlink()
    assert run("--gold_function no", "--force") == [
        *("--seed", "3", "--output", str(tmp_path), "--gold_function", "no")
    ]
    assert "forecast: as told (" in capsys.readouterr().out


def test_one_that_is_worth_it_is_told_once_and_not_where_a_run_goes_on(run, capsys):
    run("--gold_function yes")
    assert "as told. For PPO: --kl_target 0.64, and --eval_interval so small (" in capsys.readouterr().out
    run("--gold_function no")
    assert capsys.readouterr().out == ""


def test_a_forecast_that_fails_ends_the_run_where_it_was_asked_for(run, capsys):
    with pytest.raises(UserError, match=r"--forecast: the forecast ended with exit code 1: error: no such g"):
        run("--gold_function crash")
    assert run(None, GUARD, "crash") is None
    assert "WARNING: the forecast ended with exit code 1: error: no such gold" in capsys.readouterr().out
    with pytest.raises(UserError, match="--forecast needs --output_dir"):
        check_worth(rlhf("--forecast", "--judge u"), 1, 1)


def test_unasked_it_is_made_by_the_second_reward_model_where_that_is_cheap(run, capsys):
    assert run(None, GUARD, "yes")[-6:] == [
        "--gold_reward_model",
        "yes",
        "--num_prompts",
        "200",
        "--num_answers",
        "64",
    ]
    # 64 answers to 150 prompts are 9600, a quarter of 38400.
    assert cheap_words("g", 38_400, 150)[-3:] == ["150", "--num_answers", "64"]
    assert cheap_words("g", 38_399, 150)[-3:] == ["150", "--num_answers", "32"]
    assert cheap_words("g", 6400, 100)[-3:] == ["100", "--num_answers", "16"]
    # 16 answers to 112 prompts are 1792, a quarter of 7168; for all 600 prompts there is no room.
    assert cheap_words("g", 7200, 600)[-3:] == ["112", "--num_answers", "16"]
    capsys.readouterr()
    assert cheap_words("g", 6399, 100) == cheap_words("g", 10**6, 99) == []
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert "(99 are)" in said[1]
    assert "--forecast '--gold_reward_model g' makes one" in said[0]


def test_without_anything_to_believe_a_line_says_how_to_ask(run, capsys):
    assert run() is run(None, GUARD, "c") is None  # which is the reward model itself
    assert "--forecast, or dschat forecast" in capsys.readouterr().out
    assert run("none", GUARD, "yes") is None
    assert run(None, GUARD, "yes", "--reward_function", "a.py:f") is None
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_two_ranks_end_before_training_and_train_where_forced(tmp_path):
    save_counting_pairs(tmp_path / "pairs.jsonl")
    save_tiny_model(tmp_path / "base")
    save_reward_model(tmp_path / "base", tmp_path / "reward")
    (tmp_path / "gold.py").write_text("def same(prompts, answers):\n    return [1.0] * len(answers)\n")
    flags = [
        f"--actor_model_name_or_path={tmp_path / 'base'}",
        f"--critic_model_name_or_path={tmp_path / 'reward'}",
        f"--data_path={tmp_path / 'pairs.jsonl'}",
        f"--data_output_path={tmp_path / 'cache'}",
        f"--output_dir={tmp_path / 'ppo'}",
        f"--forecast=--gold_function {tmp_path}/gold.py:same --num_answers 4 --num_prompts 20",
        *("--dtype=fp32", "--max_answer_seq_len=4", "--data_split=0,0,1", "--eval_fraction=0.5"),
        *("--per_device_generation_batch_size=8", "--per_device_training_batch_size=4"),
        *("--enable_test_mode", "--test_stop_step=1", "--num_warmup_steps=0"),
    ]
    said = python(PPO, *flags, ranks=2, check=False)
    assert said.returncode != 0
    assert "not worth PPO" in said.stdout + said.stderr
    assert "train all the same with --force" in said.stdout + said.stderr
    assert not (tmp_path / "ppo" / "metrics.jsonl").exists()
    python(PPO, *flags, "--force", ranks=2)
    assert json.loads((tmp_path / "ppo" / "summary.json").read_text())["ppo_steps"] == 1
    assert not json.loads((tmp_path / "ppo" / "forecast.json").read_text())["is_worth_it"]
