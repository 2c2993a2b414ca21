"""The words for reward models whose fault is known, from models on disk; and what cannot be reported on."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import ROOT, python
from tiny import save_reward_model, save_tiny_model, tiny_tokenizer

from dschat.errors import UserError
from dschat.export.export import export_model
from dschat.models.loading import create_critic_model
from dschat.models.tokenizer import load_tokenizer
from scripts import reward_report

SHARED = Path(os.environ.get("DSCHAT_SHARED", ROOT.parent / "shared"))
HH = SHARED / "data" / "hh_rlhf_harmless" / "test.jsonl.gz"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_reward_model(save_tiny_model(folder / "base"), folder / "random")
    return folder


def write_pairs(path: Path, *, chosen_is_longer: float, number: int = 300) -> Path:
    """Random words: which of two answers is the better one tells nothing, but for its length."""
    random = np.random.default_rng(1)
    words = ["alpha", "beta", "gamma", "delta"]
    lines = []
    for row in range(number):
        short, long = (" ".join(random.choice(words, size)) for size in (4, 12))
        pair = (long, short) if random.random() < chosen_is_longer else (short, long)
        lines.append(json.dumps({"prompt": f"Question {row}?", "chosen": pair[0], "rejected": pair[1]}))
    path.write_text("\n".join(lines) + "\n")
    return path


def verdict(model: Path, data: Path, capsys) -> dict:
    reward_report.main([str(model), "--data", str(data), "--output-dir", str(data.parent)])
    found = json.loads((data.parent / "reward_report.json").read_text())
    assert f"report on the reward model: {found['verdict']} (" in capsys.readouterr().out.splitlines()[-1]
    return found


def test_a_random_model_is_no_better_than_chance_and_one_by_length_no_better_than_length(
    models, tmp_path, capsys
):
    """The second learns to score length, and nothing else."""
    data = write_pairs(tmp_path / "even.jsonl", chosen_is_longer=0.5)
    assert verdict(models / "random", data, capsys)["verdict"] == "no better than chance"
    learned = models / "by_length"
    train_on_length(models / "base", learned)
    found = verdict(learned, write_pairs(tmp_path / "longer.jsonl", chosen_is_longer=0.7), capsys)
    assert found["verdict"].startswith("no better than length")
    assert found["accuracy"]["value"] == pytest.approx(found["longer_answer_accuracy"]["value"], abs=0.02)
    assert found["length_correlation"]["value"] > 0.6
    swapped = verdict(learned, write_pairs(tmp_path / "shorter.jsonl", chosen_is_longer=0.2), capsys)
    assert swapped["verdict"] == "worse than chance"
    assert swapped["mistakes"][0]["prompt"].count("Question")


@pytest.mark.slow
@pytest.mark.skipif(not HH.exists(), reason="needs the shared HH data")
def test_on_real_preferences_a_model_trained_on_length_is_no_better_than_length(tmp_path, capsys):
    """Step 2 on pairs of HH whose shorter dialogue counts as better; the report by HH's own labels."""
    with gzip.open(HH, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    shorter_first = [sorted(row.values(), key=len) for row in rows[:1500]]
    relabelled = [
        {"chosen": short, "rejected": long} for short, long in shorter_first if len(short) < len(long)
    ]
    for name, lines in (("by_length", relabelled), ("hh", rows[1500:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = tiny_tokenizer([pair["chosen"] for pair in relabelled[:300]], vocab_size=1024)
    base = save_tiny_model(tmp_path / "base", "gpt2", tokenizer=tokenizer)
    python(
        ROOT / "step2_reward" / "main.py",
        *("--model_name_or_path", base, "--output_dir", tmp_path / "reward", "--eval_fraction", 0.02),
        *("--data_path", tmp_path / "by_length.jsonl", "--data_output_path", tmp_path / "cache"),
        *("--data_split", "0,1,0", "--dtype", "fp32", "--per_device_train_batch_size", 16),
        *("--learning_rate", 3e-3, "--num_train_epochs", 1, "--max_train_samples", 800),
    )
    found = verdict(tmp_path / "reward", tmp_path / "hh.jsonl", capsys)
    assert found["verdict"].startswith("no better than length")
    assert found["accuracy"]["low"] > 0.5
    assert found["longer_answer_accuracy"]["high"] < 0.5  # about 44 % of HH
    assert found["lead_correlation"]["value"] < -0.5


def train_on_length(base: Path, folder: Path) -> None:
    """A reward model whose score is trained to rise with the number of tokens."""
    tokenizer = load_tokenizer(str(base))
    torch.manual_seed(0)
    model = create_critic_model(str(base), tokenizer, None)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(60):
        rows = [f"Question {step * 8 + n}? " + "beta " * (2 + (7 * n + step) % 14) for n in range(8)]
        batch = tokenizer(rows, return_tensors="pt", padding=True)
        lengths = batch["attention_mask"].sum(dim=1)
        values = model.forward_value(batch["input_ids"], batch["attention_mask"], return_value_only=True)
        scores = values[torch.arange(8), lengths - 1]
        loss = (scores - (lengths - lengths.float().mean()) / 4).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    export_model(model, tokenizer, folder)


def test_the_page_in_a_browser(browser, models, tmp_path, capsys):
    data = write_pairs(tmp_path / "pairs.jsonl", chosen_is_longer=0.6, number=60)
    verdict(models / "random", data, capsys)
    browser.check(tmp_path / "reward_report.html", "reward_report")
    assert browser.evaluate("document.querySelectorAll('svg').length") == 3


def test_what_cannot_be_reported_on_is_said_before_a_model_is_loaded(models, tmp_path):
    with pytest.raises(UserError, match=r"random has no arguments.json that says .* held out; give --data"):
        reward_report.main([str(models / "random")])
    with pytest.raises(UserError, match="--batch-size must be at least 1, got 0"):
        reward_report.parse(["m", "--batch-size", "0"])
    with pytest.raises(UserError, match=r"--output-dir .*nowhere is no folder"):
        reward_report.parse(["m", "--output-dir", str(tmp_path / "nowhere")])
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(UserError, match="there are no pairs to score; give other --data"):
        reward_report.main([str(models / "random"), "--data", str(tmp_path / "prompts.jsonl")])
