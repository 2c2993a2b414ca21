"""benchmarks/versus_trl.py: commands are parsed, batches counted; trainers are built where trl is there."""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import versus
import versus_setting as setting
import versus_trl
from tiny import save_reward_model, save_tiny_model
from transformers import AutoTokenizer
from versus_marks import Marks

TRAINERS = {"sft": "sft", "sft-packing": "sft", "reward": "reward", "ppo": "ppo", "rloo": "rloo"}
"""Workloads by what TRL does with them."""


def parsed(monkeypatch, trainer: str, folder: Path, **changed: object) -> argparse.Namespace:
    """What versus_trl.py makes of the command that versus.py gives it."""
    args = argparse.Namespace(folder=folder, share=1.0)
    command = versus.trl(args, "python", trainer, setting.WORKLOADS[TRAINERS[trainer]], folder / "out")
    monkeypatch.setattr(sys, "argv", command[1:])
    given = versus_trl.parse()
    return argparse.Namespace(**vars(given) | changed)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_command_of_every_workload_is_understood(trainer, monkeypatch):
    args = parsed(monkeypatch, trainer, Path("/f"))
    workload = setting.WORKLOADS[TRAINERS[trainer]]
    assert (args.workload, args.batch, args.left_out) == (trainer, workload.batch, workload.left_out)
    assert args.left_out < args.steps <= workload.num_steps
    assert args.rows == Path(f"/f/{workload.rows}.jsonl")
    assert callable(getattr(versus_trl, TRAINERS[trainer]))
    assert versus_trl.common(args)["per_device_train_batch_size"] == workload.batch


def test_steps_are_noted_with_the_batches_that_they_learned_from():
    marks, batches = Marks(1), []
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    collators = [
        versus_trl.counting(lambda rows: {"attention_mask": mask}, batches, len),
        versus_trl.counting(lambda rows: {"input_ids": mask}, batches, lambda rows: 7),
    ]
    for collate in collators:  # both before the first step, as a loader that is ahead does
        collate([{}, {}])
    note = versus_trl.Note(marks, batches)
    for _ in collators:
        note.on_step_end(SimpleNamespace(), SimpleNamespace(), SimpleNamespace())
    assert (marks.samples, marks.tokens) == ([2, 7], [3, 6])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tiny models and a few rows under the names of the setting."""
    folder = tmp_path_factory.mktemp("versus_trl")
    save_reward_model(save_tiny_model(folder / "sft"), folder / "reward")
    save_tiny_model(folder / "6m")
    ids = [5, 6, 7, 8]
    rows = {
        "sft": {"input_ids": ids, "completion_mask": [0, 0, 1, 1]},
        "pairs": {"chosen_ids": ids, "rejected_ids": ids[:3]},
        "prompts": {"input_ids": ids, "prompt": "Count."},
    }
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 16)
    return folder


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_trainer_is_built(trainer, folder, monkeypatch):
    pytest.importorskip("trl.experimental.ppo" if trainer == "ppo" else "trl", reason="trl is not installed")
    args = parsed(monkeypatch, trainer, folder, batch=4, steps=2)
    tokenizer = AutoTokenizer.from_pretrained(folder / "6m", padding_side="left")
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    built = getattr(versus_trl, TRAINERS[trainer])(args, tokenizer, rows, Marks(1))
    assert built.args.per_device_train_batch_size == 4
    assert callable(built.train)
