"""The loop around PPO steps, with everything around it made up."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dschat.arguments import parse_arguments
from dschat.checkpoints.state import Progress
from dschat.rlhf import train
from dschat.rlhf.position import Position
from dschat.rlhf.train import train_ppo

UPDATES = 2
"""Optimiser steps of a PPO step."""


class Trainer:
    """Takes steps without models."""

    def __init__(self) -> None:
        self.engine, self.parts, self.parts_to_keep = SimpleNamespace(by_name={}), {}, {}
        self.position, self.steps, self.experience = Position(), [], "experience"

    @property
    def is_inside_ppo_step(self) -> bool:
        return self.position.is_inside(UPDATES)

    @property
    def num_ppo_steps_done(self) -> int:
        return self.position.num_ppo_steps_done(UPDATES)

    @property
    def num_updates(self) -> int:
        return self.position.num_updates(UPDATES)

    def step(self, prompts: list, *, ppo_step: int, after_update: Any) -> dict[str, float]:
        self.steps.append((ppo_step, prompts))
        self.position.begin_ppo_step(ppo_step)
        for _ in range(UPDATES):
            self.position.minibatches_done += 1
            after_update()
        return {"score": float(ppo_step)}


class Checkpoints:
    """Remembers when one was asked for; every one is due."""

    def __init__(self, begun: Progress) -> None:
        self.begun, self.saved = begun, []

    def load(self, engines: dict) -> Progress:
        return self.begun

    def is_due(self, step: int, *, is_last: bool) -> bool:
        return True

    def save(self, step: int, *, engines: dict, parts: dict[str, Any]) -> None:
        self.saved.append((step, parts["figures"]))


class Monitor:
    """Adds a metric; the guard ends the run at a step."""

    def __init__(self, stops_at: int = 99) -> None:
        self.guard, self.stops_at, self.seen = SimpleNamespace(stopped_by=None), stops_at, []
        self.exports = SimpleNamespace(finish=self.finish, best=SimpleNamespace())

    def after_step(self, step: int, metrics: dict, *, is_last: bool = False) -> tuple[dict, list[str]]:
        self.seen.append((step, is_last))
        self.guard.stopped_by = "kl" if step == self.stops_at else None
        return {**metrics, "eval_score": step}, [f"line of {step}"]

    def finish(self, step: int, metrics: dict) -> dict[str, Any]:
        self.exports.best.log(1, {"eval/acc": 0.5})  # the logger is open still
        return {"verdict": f"that of {step}"}

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state_dict: dict) -> None:
        pass


class Speed:
    """No figures, and notes the lines that were due."""

    def __init__(self) -> None:
        self.lines, self.saving = [], nullcontext

    def figures(self, metrics: dict[str, float]) -> dict[str, float]:
        return {"tokens_per_second": 7.0}

    def print_now_and_then(self, step: int, *, is_last: bool) -> None:
        self.lines.append((step, is_last))


class Loader:
    def steps_after(self, num_done: int) -> Any:
        return iter([[]] * (5 - num_done))


@pytest.fixture(autouse=True)
def samples(monkeypatch):
    """In place of those of an experience."""
    monkeypatch.setattr(train, "distributions", lambda experience: {})
    monkeypatch.setattr(train, "samples_of", lambda experience, tokenizer: [{"answer": experience}])
    monkeypatch.setattr(train, "samples_table", lambda step, rows: f"table of {step}: {rows}")


def trained(tmp_path: Path, begun: Progress, *flags: str, stops_at: int = 99, done: int = 0):
    models = ["--actor_model_name_or_path=a", "--critic_model_name_or_path=b"]
    args = parse_arguments("rlhf", [*models, f"--output_dir={tmp_path}", *flags])
    trainer, checkpoints, monitor = Trainer(), Checkpoints(begun), Monitor(stops_at)
    if done:
        trainer.position = Position(done, minibatches_done=UPDATES)
    result = train_ppo(
        trainer,
        Loader(),
        monitor,
        description=args.description,
        rollout=args.rollout,
        speed=Speed(),
        num_ppo_steps=3,
        tokenizer=None,
        checkpoints=checkpoints,
    )
    return result[:2], trainer, checkpoints, monitor


def test_a_run_is_monitored_before_the_first_step_and_after_each(tmp_path, capsys):
    (done, metrics), trainer, _, monitor = trained(tmp_path, Progress())
    expected = {"score": 2.0, "tokens_per_second": 7.0, "eval_score": 3, "verdict": "that of 3"}
    assert (done, metrics) == (3, expected)
    last = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last) == {"step": 1, "eval/acc": 0.5}
    assert [number for number, _ in trainer.steps] == [0, 1, 2]
    assert monitor.seen == [(0, False), (1, False), (2, False), (3, True)]
    assert "line of 2" in capsys.readouterr().out


@pytest.mark.parametrize("is_printed", [True, False])
def test_samples_are_taken_at_their_interval_and_printed_if_asked_for(is_printed, tmp_path, capsys):
    trained(tmp_path, Progress(), "--print_answers_interval=2", *["--print_answers"] * is_printed)
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 2, "answer": "experience"}]
    assert capsys.readouterr().out.count("table of 2: ") == is_printed


def test_checkpoints_inside_a_step_have_the_metrics_of_the_step_before(tmp_path):
    _, _, checkpoints, _ = trained(tmp_path, Progress())
    # Two optimiser steps in each PPO step: one inside of it, one with its metrics.
    assert [step for step, _ in checkpoints.saved] == [1, 2, 3, 4, 5, 6]
    assert [metrics["eval_score"] for _, metrics in checkpoints.saved] == [0, 1, 1, 2, 2, 3]


def test_a_resumed_run_goes_on_with_its_metrics_and_is_not_evaluated_anew(tmp_path):
    begun = Progress(4, {"figures": {"eval_score": 2}, "seconds": 1.0})
    (done, _), trainer, checkpoints, monitor = trained(tmp_path, begun, done=2)
    assert (done, [number for number, _ in trainer.steps]) == (3, [2])
    assert checkpoints.saved[0] == (5, {"eval_score": 2})
    assert monitor.seen == [(3, True)]


def test_the_guard_ends_a_run(tmp_path):
    (done, metrics), *_ = trained(tmp_path, Progress(), stops_at=2)
    assert (done, metrics["eval_score"]) == (2, 2)
