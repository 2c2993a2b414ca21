"""A PPO step of a finished run again: the logged metrics to the last bit, and what would have been."""

import copy
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest
from processes import ROOT, python
from test_ppo_resume import FLAGS as ppo_flags
from test_ppo_resume import STEERED
from tiny import save_reward_model, save_tiny_model

from dschat.errors import UserError
from scripts import replay
from scripts.replay_page import both_shown, replay_page

WORKER = ROOT / "tests" / "workers" / "replays.py"
FLAGS = ppo_flags | STEERED | {"eval_interval": 2, "save_interval": 8}
"""3 PPO steps of 4 optimiser steps; checkpoints after the second and the third."""
MOVED_BY_BETA = {"kl_reward", "raw_advantage", "advantage", "return", "logprob", "new_value", "ratio"}


def made(folder: Path, ranks: int, replays: list[list[str]], **options: object) -> list[dict]:
    """What replay.json of each replay has, of a run in `folder`, which the replays leave as it was."""
    save_tiny_model(folder / "actor", "llama")
    save_tiny_model(folder / "base", "llama", seed=1)
    save_reward_model(folder / "base", folder / "reward")
    rows = [
        {"prompt": f"\n\nHuman: Count to {n}.\n\nAssistant:", "chosen": " one", "rejected": " two"}
        for n in range(27)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = {"actor_model_name_or_path": "actor", "critic_model_name_or_path": "reward"}
    paths |= {"data_path": "pairs.jsonl", "data_output_path": "cache", "output_dir": "ppo"}
    flags = {name: folder / path for name, path in paths.items()} | FLAGS | options
    outputs = [folder / f"replayed{number}" for number in range(len(replays))]
    asked = {
        "run": [f"--{name}={value}" for name, value in flags.items()],
        "replays": [
            [str(folder / "ppo"), *words, "--output", str(output)]
            for words, output in zip(replays, outputs, strict=True)
        ],
    }
    (folder / "asked.json").write_text(json.dumps(asked))
    python(WORKER, folder / "asked.json", ranks=ranks)
    return [json.loads((output / replay.NAME).read_text()) for output in outputs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("replay")


@pytest.fixture(scope="module")
def replays(folder) -> list[dict]:
    words = [["--step", "3"], ["--step", "2", "--with", "kl_coef=0.2", "--with", "eval_interval=3"]]
    return made(folder, 1, words)


def test_the_step_after_a_checkpoint_is_the_logged_one_to_the_last_bit(folder, replays):
    found = replays[0]
    assert found["checkpoint"] == str(folder / "ppo" / "checkpoints" / "step_00000008")
    assert (found["steps_between"], found["different"], found["not_replayed"]) == (0, {}, [])
    assert {"score", "kl", "policy_loss", "actor_grad_norm", "eval_score", "kl_coef"} <= set(found["equal"])
    assert not [name for name in found["equal"] if "seconds" in name]


def test_without_a_checkpoint_before_it_the_run_begins_again(replays):
    found = replays[1]
    assert (found["checkpoint"], found["steps_between"], found["different"]) == (None, 1, {})


def test_another_beta_changes_rewards_and_what_follows_from_them_and_nothing_else(replays):
    what_if = replays[1]["what_if"]
    assert what_if["flags"] == {"kl_coef": [0.1, 0.2]}  # eval_interval holds for both
    assert set(what_if["columns"]) == MOVED_BY_BETA
    assert {"score", "kl", "entropy", "answer_length"} <= set(what_if["same_metrics"])
    assert {"score_minus_kl", "advantage_mean", "policy_loss", "eval_kl"} <= set(what_if["metrics"])
    assert what_if["metrics"]["kl_coef"][1] == 0.2


def test_the_numbers_of_a_token_are_those_of_the_papers(replays):
    found = replays[1]
    for answers, beta in (
        (found["answers"], found["metrics"]["kl_coef"]),
        (found["what_if"]["answers"], 0.2),
    ):
        for answer in answers:
            after, advantage = 0.0, 0.0
            for number, token in enumerate(reversed(answer["tokens"])):
                score = answer["shaped_score"] if number == 0 else 0.0
                assert token["score_reward"] == pytest.approx(score)
                assert token["kl"] == pytest.approx(token["old_logprob"] - token["ref_logprob"], abs=1e-6)
                assert token["kl_reward"] == pytest.approx(-beta * token["kl"], abs=1e-6)
                # Schulman et al. 2016, gamma 1 and lambda 0.95, from the last token to the first.
                delta = token["kl_reward"] + token["score_reward"] + after - token["value"]
                advantage = delta + 0.95 * advantage
                after = token["value"]
                assert token["raw_advantage"] == pytest.approx(advantage, abs=1e-5)
                assert token["return"] == pytest.approx(advantage + token["value"], abs=1e-5)
                for said in token["passes"]:
                    assert said["ratio"] == pytest.approx(math.exp(said["logprob"] - token["old_logprob"]))
                    assert bool(said["clipped"]) == (abs(said["ratio"] - 1) > 0.2)
                assert len(token["passes"]) == FLAGS["ppo_epochs"]
    ratios = [one["passes"][1]["ratio"] for answer in found["answers"] for one in answer["tokens"]]
    assert any(abs(ratio - 1) > 1e-4 for ratio in ratios)  # the second pass meets other weights


def test_the_prompts_that_were_asked_for_are_shown(replays):
    assert [answer["prompt"] for answer in replays[0]["answers"]] == [1, 2, 3]
    assert all(answer["prompt_text"].startswith("\n\nHuman: Count to") for answer in replays[0]["answers"])


def plan(folder: Path, *words: str) -> replay.Replay:
    return replay.plan(replay.parse([str(folder / "ppo"), *words]))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--step", "4"], ["--step 4", "the PPO steps 1 to 3"]),
        (["--step", "0"], ["--step must be at least 1"]),
        (["--step", "2", "--prompt", "0"], ["--prompt must be at least 1"]),
        (["--step", "2", "--with", "kl_coef"], ["--with kl_coef", "FLAG=VALUE"]),
        (["--step", "2", "--with", "kl_coeff=1"], ["unknown flag --kl_coeff", "did you mean --kl_coef?"]),
        (["--step", "2", "--with", "gamma=2"], ["--gamma must lie in [0, 1], got 2.0"]),
        (["--step", "2", "--with", "kl_coef=much"], ["--kl_coef", "'much'"]),
        (["--step", "2", "--with", "seed=2"], ["--with seed=2", "cannot change", "kl_coef, "]),
        (["--step", "2", "--with", "output_dir=x"], ["--with output_dir=x", "cannot change"]),
    ],
)
def test_what_cannot_be_replayed_is_refused_before_a_model_is_loaded(folder, replays, words, parts):
    with pytest.raises(UserError) as error:
        plan(folder, *words)
    assert [part for part in parts if part not in str(error.value)] == []


def test_a_run_of_other_ranks_names_the_command(folder, replays, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["replay.py", "ppo", "--step", "3"])
    with pytest.raises(
        UserError, match=r"is of 1 rank and this replay of 2.* with python replay.py ppo --step 3"
    ):
        plan(folder, "--step", "3")


def test_a_damaged_checkpoint_is_passed_over(folder, replays, tmp_path, capsys):
    shutil.copytree(folder / "ppo", tmp_path / "ppo")
    (tmp_path / "ppo" / "checkpoints" / "step_00000008" / "progress.json").write_text("{}")
    assert plan(tmp_path, "--step", "3").checkpoint is None
    assert "step_00000008 is passed over" in capsys.readouterr().out


def test_numbers_of_eval_command_are_not_the_metrics_of_the_step(tmp_path):
    (tmp_path / "arguments.json").write_text('{"rlhf": {}}')
    lines = [{"step": 1, "kl": 0.5}, {"step": 2, "kl": 0.6}, {"step": 2, "eval/acc": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert replay._logged(tmp_path, 2) == lines[1]


def test_a_folder_that_is_no_run_of_step_3_is_named(folder, replays, tmp_path):
    (tmp_path / "pipeline").mkdir()
    shutil.copytree(folder / "ppo", tmp_path / "pipeline" / "step3_ppo", ignore=lambda *_: ["checkpoints"])
    with pytest.raises(UserError, match=r"no arguments.json; did you mean .*pipeline/step3_ppo\?"):
        replay.plan(replay.parse([str(tmp_path / "pipeline"), "--step", "1"]))
    with pytest.raises(UserError, match=r"--output .* is in the run's folder"):
        replay.parse([str(folder / "ppo"), "--step", "1", "--output", str(folder / "ppo" / "x")])


@pytest.mark.slow
def test_a_run_of_two_ranks_is_replayed_on_two(tmp_path):
    halves = {"generation_batches": 1, "gradient_accumulation_steps": 1, "critic_zero_stage": 3}
    (found,) = made(tmp_path, 2, [["--step", "3", "--with", "ratio_clip=0.01"]], **halves)
    assert (found["ranks"], found["steps_between"], found["different"]) == (2, 0, {})
    assert set(found["what_if"]["columns"]) <= {"logprob", "ratio"}
    assert not [one for answer in found["answers"] for one in answer["tokens"] if len(one["passes"]) != 2]


def test_the_page_shows_commands_that_parse_and_names_what_the_file_has(replays):
    page = (ROOT / "docs" / "replay.md").read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in re.findall(r"^dschat replay (.*)$", page, re.MULTILINE)]
    assert [replay.parse(words).step for words in commands] == [12, 12]
    token = replays[0]["answers"][0]["tokens"][0]
    fields = {**token, **token["passes"][0]}
    rows = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) <= fields.keys()
    whatever = page.partition("act within one PPO step:")[2].partition(". A flag")[0]
    assert set(re.findall(r"`(\w+)`", whatever)) == set(replay.WHAT_IFS)


def test_the_page_shows_every_token_of_both_versions_and_escapes_them(replays):
    page = replay_page(replays[1])
    both = [*replays[1]["answers"], *replays[1]["what_if"]["answers"]]
    assert page.count('<span class="token') == sum(len(answer["tokens"]) for answer in both)
    assert "--kl_coef 0.2 in place of 0.1" in page
    assert "equal to the last bit" in page
    spoilt = copy.deepcopy(replays[0])
    spoilt["answers"][0]["tokens"][0]["text"] = "<script>"
    spoilt["different"] = {"kl": [0.1, 0.2]}
    page = replay_page(spoilt)
    assert "<script>" not in page
    assert "1 of " in page
    assert "metrics are not the logged ones" in page


def test_the_page_in_a_browser(browser, folder, replays):
    browser.check(folder / "replayed1" / "replay.html", "replay")
    assert browser.evaluate("document.querySelectorAll('.token').length") > 0


def test_values_that_six_digits_do_not_tell_apart_are_shown_in_all():
    assert both_shown(0.25, 1e-9) == ("0.25", "1e-09")
    assert both_shown(1.0, 1.0000001) == ("1.0", "1.0000001")
    assert both_shown(3, 4) == ("3", "4")
