"""The order of things in a run; that real models learn is tested in tests/steps."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dschat.arguments import parse_arguments
from dschat.data.preparation import SplitData
from dschat.data.rows import Rows
from dschat.engines.speed import PHASES
from dschat.supervised import loop
from dschat.supervised.batches import build_loaders
from dschat.supervised.loop import Objective, train_epochs
from dschat.supervised.settings import SupervisedSettings


class Begun:
    """Where a run begins: the steps that are done, and what its parts held."""

    def __init__(self, step: int) -> None:
        self.step, self.values = step, {"seconds": 60.0} if step else {}

    def restore(self, parts: dict[str, Any]) -> None:
        """Nothing is restored here."""


class Speed:
    """No figures."""

    def counting(self, loss_and_metrics: Any) -> Any:
        return loss_and_metrics

    def end_of(self, phase: str) -> None:
        assert phase in PHASES

    def figures(self, trained: dict[str, float]) -> dict[str, float]:
        return {}

    def print_now_and_then(self, step: int, *, is_last: bool) -> None:
        pass


class Run:
    """What `train_epochs` called, in order: a step is its number, all else a word with one."""

    best = SimpleNamespace()

    def __init__(self, *flags: str, done: int = 0, due: int = 0) -> None:
        self.calls: list[Any] = []
        self.step, self.due, self.begun = done, due, Begun(done)
        argv = ["--model_name_or_path=m", "--per_device_train_batch_size=2", *flags]
        self.settings = SupervisedSettings.of(parse_arguments("sft", argv))
        rows = Rows.from_dict({"length": [3, 4, 5, 6, 7, 8]})
        self.loaders = build_loaders(SplitData(rows, rows, {}, "key"), self.collate, self.settings)

    def collate(self, rows: Any, num_rows: int, denominator: float) -> int:
        return rows.num_rows

    def train_step(
        self, engine: Any, micro_batches: list[int], loss_and_metrics: Any, *, end_of: Any
    ) -> dict[str, float]:
        self.step += 1
        self.calls.append(self.step)
        return {name: value.item() for name, value in loss_and_metrics(sum(micro_batches)).items()}

    def loss_and_metrics(self, engine: Any, num_rows: int) -> dict[str, torch.Tensor]:
        return {"loss": torch.tensor(float(num_rows))}

    def evaluate(self, engine: Any, loader: Any) -> dict[str, float]:
        self.calls.append(f"evaluate {len(loader.order)} rows")
        return {"eval_loss": 1.0}

    def load(self, engines: dict[str, Any]) -> Begun:
        return self.begun

    def is_due(self, step: int, *, is_last: bool) -> bool:
        return step == self.due

    def save(self, step: int, *, engines: dict[str, Any], parts: dict[str, Any]) -> None:
        assert sorted(parts) == ["chance", "evaluations", "exports", "seconds", "skipped"]
        assert parts["seconds"] >= self.begun.values.get("seconds", 0)
        self.calls.append(f"save {step}")

    def offer(self, evaluations: list[Any]) -> None:
        self.calls.append(f"offer {evaluations[-1].step}")

    def finish(self, step: int, evaluations: list[Any], seconds: float) -> None:
        self.calls.append(f"finish {step}")

    def train(self, monkeypatch) -> list[Any]:
        monkeypatch.setattr(loop, "train_step", self.train_step)
        monkeypatch.setattr(loop, "Speed", lambda *_: Speed())
        monkeypatch.setattr(loop, "learning_rate", lambda engine: 1e-3)
        monkeypatch.setattr(loop, "gradient_norm", lambda engine: 1.0)
        engine = SimpleNamespace(skip_reason=None, eval=lambda: None)
        objective = Objective("test", self.loss_and_metrics, self.evaluate, print_loss=True)
        train_epochs(engine, self.loaders, self.settings, objective, self, self)
        return self.calls


ALL = "evaluate 6 rows"


def test_a_run_evaluates_before_training_and_after_each_epoch(monkeypatch, capsys):
    run = Run("--num_train_epochs=2")  # three steps of two rows an epoch
    first, second = [1, 2, 3, ALL, "offer 3"], [4, 5, 6, ALL, "offer 6"]
    assert run.train(monkeypatch) == [ALL, *first, *second, "finish 6"]
    printed = capsys.readouterr().out
    assert "epoch 2: eval_loss 1.0000" in printed
    assert "step 6: loss 2.0000" in printed


def test_part_of_an_epoch_ends_with_an_evaluation(monkeypatch, capsys):
    assert Run("--num_train_epochs=0.5").train(monkeypatch) == [ALL, 1, 2, ALL, "offer 2", "finish 2"]
    assert "epoch 0.5: eval_loss" in capsys.readouterr().out


def test_between_epochs_a_part_of_the_rows_is_evaluated(monkeypatch):
    run = Run("--eval_interval=2", "--eval_iters=1", "--per_device_eval_batch_size=2")
    short = "evaluate 2 rows"
    # At an epoch's end the short part is evaluated first: by it evaluations are compared, and a report
    # is of the last one.
    beginning, middle, end = [short, ALL], [1, 2, short, "offer 2"], [3, short, ALL, "offer 3", "finish 3"]
    assert run.train(monkeypatch) == [*beginning, *middle, *end]


@pytest.mark.parametrize(("done", "left"), [(1, [2, 3]), (2, [3])])
def test_a_resumed_run_goes_on_where_it_was_and_is_not_evaluated_first(done, left, monkeypatch):
    run = Run("--num_train_epochs=1", done=done, due=3)
    assert run.train(monkeypatch) == [*left, ALL, "offer 3", "save 3", "finish 3"]
