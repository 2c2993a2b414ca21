"""The forecast of a reward model: what it samples, how it scores, and what it refuses."""

import json
import re
import shlex
from pathlib import Path

import pytest
from processes import ROOT, python
from tiny import save_reward_model, save_tiny_model

from dschat.errors import UserError
from scripts import forecast

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


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["nothing says what good answers are", "--gold_function FILE.py:NAME", "--gold_reward_model"]),
        (["--gold_reward_model", "c"], ["--gold_reward_model c is the reward model in question"]),
        (["--gold_reward_model", "g", "--num_answers", "3"], ["--num_answers must be at least 4, got 3"]),
        (["--gold_reward_model", "g", "--num_prompts", "5"], ["--num_prompts must be at least 20, got 5"]),
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
    assert [bool(own.gold_function) for own in golds] == [True, False]
