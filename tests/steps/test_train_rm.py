"""train_rm.py by its own usage: from inside its folder, on tokenised data, to a reward model of ours."""

import json
import random
from pathlib import Path

import pytest
from datasets import Dataset
from processes import ROOT, python
from tiny import save_tiny_model
from transformers import AutoModelForSequenceClassification

from dschat.export.upstream import verify_model

FOLDER = ROOT / "step2_reward"
NUM_PAIRS = 40


def pair(draw: random.Random) -> dict:
    """A pair in ColossalChat's form: good answers have small ids, bad ones large."""
    sides = {"chosen": range(5, 100), "rejected": range(200, 360)}
    prompt = draw.choices(range(5, 360), k=draw.randrange(4, 10))
    row = {}
    for side, ids in sides.items():
        answer = [*draw.choices(ids, k=draw.randrange(2, 8)), 0]
        row[f"{side}_input_ids"] = prompt + answer
        row[f"{side}_loss_mask"] = [0] * len(prompt) + [1] * len(answer)
        row[f"{side}_label_decode"] = "text"
    return row


@pytest.fixture(scope="module")
def seed(tmp_path_factory) -> Path:
    """A folder with a model M and tokenised data D of two parts, E of one."""
    folder, draw = tmp_path_factory.mktemp("seed"), random.Random(1)
    save_tiny_model(folder / "M", "llama")
    for part in ("D/part-00000", "D/part-00001", "E"):
        rows = [pair(draw) for _ in range(NUM_PAIRS // 2)]
        Dataset.from_list(rows).save_to_disk(str(folder / part))
    return folder


def train(seed: Path, save_dir: Path, line: str, *, ranks: int = 1) -> tuple[str, Path]:
    """What a command line in the seed's folder prints, and the folder of its model."""
    given = ["--pretrain", seed / "M", "--dataset", seed / "D", "--data_output_path", seed / "cache"]
    words = [*given, *line.split(), "--save_dir", save_dir]
    run = python("train_rm.py", *words, ranks=ranks, cwd=FOLDER, afresh=ranks > 1)
    return run.stdout, save_dir / "modeling"


def test_the_seeds_first_line_trains_a_reward_model(seed, tmp_path):
    line = "--plugin zero2 --loss_fn log_exp --lr 1e-2 --max_epochs 3 --mixed_precision bf16 --batch_size 5 "
    line += f"--accumulation_steps 2 --eval_dataset {seed / 'E'} --config_file {tmp_path / 'config.json'}"
    printed, model = train(seed, tmp_path, line)
    assert f"step2_reward/main.py --model_name_or_path {seed / 'M'} --data_path {seed / 'D'}" in printed
    summary = json.loads((model / "summary.json").read_text())
    assert (summary["num_train_rows"], summary["num_eval_rows"]) == (NUM_PAIRS, NUM_PAIRS // 2)
    assert summary["model_step"] == 3 * NUM_PAIRS / 10
    assert summary["eval_accuracy"] > 0.7
    assert summary["chosen_mean_score"] > summary["rejected_mean_score"] + 1
    assert json.loads((tmp_path / "config.json").read_text())["plugin"] == "zero2"
    verify_model(str(model), "--critic_model_name_or_path", "score")
    assert AutoModelForSequenceClassification.from_pretrained(model).config.num_labels == 1


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("line", "ranks"),
    [
        ("--plugin zero2 --loss_fn log_sig --lr 5e-6 --max_epochs 3", 4),
        ("--plugin 3d --tp 2 --pp 2 --grad_checkpoint --use_flash_attn", 8),
        ("--plugin 3d --sp 2", 2),
        ("--plugin gemini", 2),
        ("--plugin gemini_auto", 2),
        ("--plugin zero2_cpu", 2),
        ("--plugin ddp", 2),
    ],
)
def test_every_plugin_trains_and_exports(seed, tmp_path, line, ranks):
    printed, model = train(seed, tmp_path, line, ranks=ranks)
    assert json.loads((model / "summary.json").read_text())["num_train_rows"] == NUM_PAIRS
    verify_model(str(model), "--critic_model_name_or_path", "score")
    assert ("PyTorch's own attention computes the same" in printed) == ("flash" in line)
