"""The forecast of a reward model: what it samples, how it scores, and what it refuses."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from fake_judge import FakeJudge, judging
from processes import ROOT, python
from tiny import save_reward_model, save_tiny_model

from dschat.arguments import parse_arguments
from dschat.errors import UserError
from scripts import forecast
from scripts.forecast_page import advice, forecast_page

PROGRAM = ROOT / "scripts" / "forecast.py"
GOLD = """
def short(prompts, answers, number):
    assert len(number) == len(answers)
    return [-float(len(answer)) for answer in answers]


def unsure(prompts, answers):
    if any("4" in prompt for prompt in prompts):
        raise ValueError("no idea")
    return [0.0] * len(answers)
"""
STEP3 = ["--actor_model_name_or_path", "a", "--critic_model_name_or_path", "c"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("forecast")
    save_tiny_model(folder / "actor", "llama")
    save_tiny_model(folder / "base", "llama", seed=1)
    save_reward_model(folder / "base", folder / "reward")
    save_tiny_model(folder / "base2", "llama", seed=2)
    save_reward_model(folder / "base2", folder / "reward2")
    rows = [
        {
            "prompt": f"\n\nHuman: Count to {n}.\n\nAssistant:",
            "chosen": " one",
            "rejected": " two",
            "number": n,
        }
        for n in range(60)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "gold.py").write_text(GOLD)
    return folder


def flags(folder: Path, **options: object) -> list[str]:
    settings = {
        "actor_model_name_or_path": folder / "actor",
        "critic_model_name_or_path": folder / "reward",
        "data_path": folder / "pairs.jsonl",
        "data_output_path": folder / "cache",
        "data_split": "0,0,1",
        "eval_fraction": 0.5,
        "dtype": "fp32",
        "max_prompt_seq_len": 24,
        "max_answer_seq_len": 8,
        "per_device_generation_batch_size": 16,
        "num_answers": 8,
        "num_prompts": 25,
        **options,
    }
    return [f"--{name}={value}" for name, value in settings.items()]


def test_a_second_reward_model_is_gold_and_each_answer_of_a_prompt_is_another(folder, tmp_path):
    said = python(PROGRAM, *flags(folder, gold_reward_model=folder / "reward2", output=tmp_path), check=False)
    found = json.loads((tmp_path / "forecast.json").read_text())
    assert (found["num_prompts"], found["num_answers"]) == (25, 8)
    assert [point["n"] for point in found["points"]] == [1, 2, 3, 4, 6, 8]
    scores = [point["score"]["value"] for point in found["points"]]
    assert scores == sorted(scores)
    assert scores[0] < scores[-1]  # so the 8 answers of a prompt are not one
    assert found["points"][0]["gain"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert said.returncode == int(not found["is_worth_it"])
    assert found["verdict"] in said.stdout
    assert f"all numbers: {tmp_path / 'forecast.json'}" in said.stdout
    page = (tmp_path / "forecast.html").read_text(encoding="utf-8")
    assert found["verdict"] in page
    assert page.count("<svg") == 2


def test_a_function_gets_the_columns_of_the_data_and_force_ends_with_0(folder, tmp_path):
    gold = f"{folder / 'gold.py'}:short"
    python(PROGRAM, *flags(folder, gold_function=gold, output=tmp_path), "--force")
    found = json.loads((tmp_path / "forecast.json").read_text())
    assert all(point["gold"]["value"] < 0 for point in found["points"])
    for fooled in found["fooled"]:
        assert fooled["gold"] == -len(fooled["answer"])
        assert fooled["gold"] < fooled["mean_gold"]
        assert fooled["prompt"].startswith("\n\nHuman: Count to")


def test_a_function_that_fails_ends_the_forecast(folder, tmp_path):
    gold = f"{folder / 'gold.py'}:unsure"
    said = python(PROGRAM, *flags(folder, gold_function=gold, output=tmp_path), check=False)
    assert said.returncode == 2
    assert "no idea" in said.stdout
    assert "unsure had no score for " in said.stderr
    assert not (tmp_path / "forecast.json").exists()


class Texts:
    """In the place of what is sampled: answer 1 to prompt 0 of 5 is "01"."""

    def texts(self, batches, places):
        return [(f"prompt {place // 5}", f"{place // 5}{place % 5}") for place in places]


class Beats:
    """A judge by a list of the answers that win; all others lose."""

    inconsistent = unreadable = 0

    def __init__(self, *winners):
        self.winners, self.asked = winners, []

    def wins(self, prompts, answers, others):
        self.asked += zip(prompts, answers, others, strict=True)
        return [float(answer in self.winners) for answer in answers]


def test_a_judge_compares_the_best_of_the_first_n_with_one_more_answer_and_each_pair_once():
    judge = Beats("01", "03", "12")
    # The best of 1, 2 and 4 answers to prompt 0 are answers 0, 1 and 3; to prompt 1 answers 0, 0 and 2. The
    # last column, whose scores are the highest, competes with nothing.
    shaped = np.array([[1.0, 2.0, 0.0, 5.0, 9.0], [3.0, 1.0, 4.0, 2.0, 9.0]])
    found = forecast.by_judge(judge, Texts(), [], shaped)
    assert found.sizes == (1, 2, 4)
    assert judge.asked == [
        ("prompt 0", "01", "04"),
        ("prompt 0", "03", "04"),
        ("prompt 1", "10", "14"),
        ("prompt 1", "12", "14"),
    ]
    assert found.by_n.tolist() == [[0.5, 1.0, 1.0], [0.5, 0.0, 1.0]]
    assert (found.taken.tolist(), found.of_taken.tolist()) == ([3, 2], [1.0, 1.0])


def test_a_judge_is_gold_and_asked_no_more_than_is_said(folder, tmp_path):
    FakeJudge.requests.clear()
    with judging() as url:
        secret = url.replace("//", "//me:hush@")
        words = flags(folder, judge=secret, judge_model="fake", output=tmp_path)
        said = python(PROGRAM, *words, "--force")
    found = json.loads((tmp_path / "forecast.json").read_text())
    assert [point["n"] for point in found["points"]] == [1, 2, 4, 8]
    assert found["points"][0]["gold"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert all(0 <= point["gold"]["value"] <= 1 for point in found["points"])
    assert found["gold"].startswith("the win rate by the judge fake at http://")
    asked = int(re.search(r"the judge is asked (\d+) questions", said.stdout)[1])
    assert 0 < asked <= 2 * 3 * 25
    # Two more are the trial; equal answers are a tie without a question.
    assert 2 < len(FakeJudge.requests) <= asked + 2
    assert {request["model"] for request in FakeJudge.requests} == {"fake"}
    page = (tmp_path / "forecast.html").read_text(encoding="utf-8")
    assert found["said"] in page
    assert "hush" not in page + said.stdout + json.dumps(found)


def test_a_judge_that_does_not_serve_is_named_before_a_model_is_loaded(folder, monkeypatch):
    monkeypatch.setattr("scripts.judge.time.sleep", lambda seconds: None)
    monkeypatch.setattr(forecast.Sampled, "answers", lambda self: pytest.fail("models are loaded"))
    own, args = forecast.parse(flags(folder, judge="http://127.0.0.1:9/v1", judge_model="fake"))
    with pytest.raises(UserError, match=r"--judge http://127.0.0.1:9/v1: .*refused, 4 times"):
        forecast.run(own, args)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["nothing says what good answers are", "--gold_function FILE.py:NAME", "--gold_reward_model"]),
        (["--gold_reward_model", "c"], ["--gold_reward_model c is the reward model in question"]),
        (["--gold_reward_model", "g", "--num_answers", "3"], ["--num_answers must be at least 4, got 3"]),
        (["--gold_reward_model", "g", "--num_prompts", "5"], ["--num_prompts must be at least 20, got 5"]),
        (["--judge", "http://x/v1"], ["--judge and --judge_model go together"]),
        (["--judge", "u", "--gold_reward_model", "g"], ["not allowed with argument"]),
        (["--gold_reward_model", "g", "--kl_coeff", "1"], ["unknown flag --kl_coeff", "--kl_coef?"]),
        (
            ["--gold_function", "x.py:f", "--reward_function", "x.py:g"],
            ["forecast is of the reward model alone"],
        ),
    ],
)
def test_a_command_line_that_cannot_be_meant_is_refused(words, parts):
    with pytest.raises(UserError) as error:
        forecast.parse([*STEP3, *words])
    assert [part for part in parts if part not in str(error.value)] == []


def test_several_ranks_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        forecast.parse([*STEP3, "--gold_reward_model", "g"])


def test_the_page_shows_commands_that_parse():
    page = (ROOT / "docs" / "forecast.md").read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in re.findall(r"^dschat forecast (.*)$", page, re.MULTILINE)]
    golds = [forecast.parse(words)[0] for words in commands]
    assert [bool(own.gold_function) for own in golds] == [True, False, False]
    assert golds[2].judge_model
    for words in (shlex.split(line) for line in re.findall(r"^dschat ppo (.*)$", page, re.MULTILINE)):
        assert forecast.parse([*parse_arguments("rlhf", words).forecast.words, *words])[0].gold_function


def test_the_page_in_a_browser(browser, tmp_path):
    def point(n):
        estimate = {"value": 11.25 - n, "low": 10.125, "high": 12.5}
        return {"n": n, "kl": n / 20, "score": estimate, "gold": estimate, "gain": estimate}

    answer = {"prompt": "\n\nHuman: Name a tea.", "answer": "<script>tea", "score": 2.0, "gold": 0.0}
    found = {
        "verdict": "worth PPO: gold gains 0.2 at KL 0.9",
        **{"is_worth_it": True, "turns": True, "kl_target": 0.5, "num_prompts": 128},
        **{"advice": advice(0.5, 1.0), "turning_kl": {"low": 0.2, "high": 0.64}},
        "points": [point(n) for n in (1, 2, 64)],
        "fooled": [answer | {"mean_gold": 0.5}],
        **{
            "reward_model": "output/" * 20,
            "actor": "output/sft",
            "gold": "check.py:right",
            "num_answers": 64,
        },
        **{"num_answers": 64, "seconds": {"all": 43.0}, "said": "The judge was asked 128 questions."},
    }
    path = tmp_path / "forecast.html"
    path.write_text(forecast_page(found))
    browser.check(path, "forecast")
