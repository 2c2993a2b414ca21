"""A reward that pays for length is exploited; the guard ends the run and the actor from before is kept."""

import json
from pathlib import Path

import pytest
from processes import ROOT, python
from tiny import save_reward_model, save_tiny_model
from transformers import AutoModelForCausalLM

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    """The output folder of the PPO run, and what it printed."""
    folder = tmp_path_factory.mktemp("hacking")
    rows = [
        {
            "prompt": f"\n\nHuman: Say {WORDS[i % 8]}{', please' * (i // 8)}.\n\nAssistant:",
            "chosen": f" {WORDS[i % 8]}",
        }
        for i in range(64)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row | {"rejected": " no"}) + "\n" for row in rows))
    save_tiny_model(folder / "base")
    save_reward_model(folder / "base", folder / "reward")
    common = [f"--data_path={folder / 'pairs.jsonl'}", f"--data_output_path={folder / 'cache'}"]
    common += ["--data_split=1,0,1", "--eval_fraction=0.2", "--dtype=fp32", "--num_warmup_steps=0"]
    sft = [*common, f"--model_name_or_path={folder / 'base'}", f"--output_dir={folder / 'sft'}"]
    sft += ["--per_device_train_batch_size=8", "--num_train_epochs=12", "--learning_rate=3e-3"]
    ppo = [*common, f"--output_dir={folder / 'ppo'}", "--num_train_epochs=40"]
    ppo += [f"--actor_model_name_or_path={folder / 'sft'}"]
    ppo += [f"--critic_model_name_or_path={folder / 'reward'}"]
    ppo += ["--per_device_generation_batch_size=16", "--per_device_training_batch_size=8"]
    ppo += ["--max_answer_seq_len=24", "--actor_learning_rate=1e-3", "--critic_learning_rate=1e-3"]
    ppo += ["--kl_coef=0.01", "--reward_clip=0", "--eval_interval=2", "--patience=3", "--ppo_epochs=2"]
    worker = ROOT / "tests" / "workers" / "hacked_ppo.py"
    result = python(worker, json.dumps(sft), json.dumps(ppo))
    return folder / "ppo", result.stdout + result.stderr


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_run_is_stopped_and_says_why(run):
    folder, told = run
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["stopped_by"] in ("kl", "length", "end token")
    assert (
        summary["ppo_steps"] < 50
    )  # 64 prompts of which a tenth are held out, 40 epochs, 16 a step: over 60
    assert summary["stop_reason"] in told
    assert f"the run stops after PPO step {summary['ppo_steps']}" in told
    assert "What usually helps: " in told
    assert told.index("in a row of it the run stops") < told.index("the run stops after PPO step")


@pytest.mark.slow
def test_the_score_rose_to_the_end(run):
    """So nothing but the guard would have noticed."""
    evaluations = [line for line in lines(run[0]) if "eval_score" in line]
    assert evaluations[0]["step"] == 0
    assert evaluations[-1]["step"] == json.loads((run[0] / "summary.json").read_text())["ppo_steps"]
    assert evaluations[-1]["eval_score"] > 1.5 * evaluations[0]["eval_score"]
    assert evaluations[-1]["eval_objective"] > evaluations[0]["eval_objective"]


@pytest.mark.slow
def test_the_best_actor_is_from_before_the_first_warning(run):
    folder, told = run
    summary = json.loads((folder / "summary.json").read_text())
    first_warning = int(told.partition("guard: PPO step ")[2].partition(":")[0])
    assert summary["actor_step"] == summary["best_step"] < first_warning
    best = {line["step"]: line for line in lines(folder) if "eval_score" in line}[summary["best_step"]]
    assert summary["best_eval_objective"] == best["eval_objective"]
    assert summary["best_eval_answer_length"] < summary["eval_answer_length"]


@pytest.mark.slow
def test_the_best_actor_is_in_its_folder_and_no_second_copy(run):
    folder, _ = run
    AutoModelForCausalLM.from_pretrained(folder / "actor")
    assert not (folder / "best").exists()
    summary = json.loads((folder / "summary.json").read_text())
    card = (folder / "actor" / "README.md").read_text()
    assert f"| ppo_step | {summary['best_step']} |" in card
    assert f"folder = {str(folder / 'actor')!r}" in card
