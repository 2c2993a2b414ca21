import json
from types import SimpleNamespace

import pytest
import torch

from dschat.export.verdict import Evaluation
from dschat.supervised.evaluations import Evaluations, sum_over_batches


class Engine:
    """An engine that knows whether it is in eval mode."""

    device = torch.device("cpu")
    is_training = True

    def eval(self) -> None:
        self.is_training = False


class Log:
    """A metrics logger that keeps what it is given."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict]] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        self.logged.append((step, values))


def loader(name: str, num_rows: int) -> SimpleNamespace:
    return SimpleNamespace(name=name, order=range(num_rows))


FIGURES = {"eval_accuracy": 0.75, "eval_accuracy_stderr": 0.1, "eval_pairs": 4}
LOSSES = {"whole": 2.0, "short": 3.0}


def evaluations(*, short: int | None, whole: int = 8) -> Evaluations:
    def evaluate(engine: Engine, rows: SimpleNamespace) -> dict[str, float]:
        assert not engine.is_training
        assert not torch.is_grad_enabled()
        return {"eval_loss": LOSSES[rows.name], **FIGURES} if rows.order else {}

    part = None if short is None else loader("short", short)
    return Evaluations(Engine(), evaluate, Log(), whole=loader("whole", whole), short=part)


def test_an_evaluation_is_logged_printed_and_kept_with_the_mean_training_loss_before_it(capsys):
    made = evaluations(short=None)
    assert made.last_step is None
    made.make(0, "before training")
    for loss in (1.0, 4.0):
        made.take_in(loss)
    made.make(2, "epoch 1")
    figures = {"eval_loss": 2.0, **FIGURES}
    assert made.all == [Evaluation(0, figures, 2.0, None), Evaluation(2, figures, 2.0, 2.5)]
    assert made.last_step == 2
    assert made._metrics.logged == [(0, figures), (2, figures)]
    assert "epoch 1: eval_loss 2.0000, eval_accuracy 0.7500 +- 0.1000\n" in capsys.readouterr().out


def test_where_some_are_short_all_are_compared_by_the_short_part():
    made = evaluations(short=4)
    made.make(1, "step 1", is_short=True)
    made.make(2, "epoch 1")
    assert [(one.figures["eval_loss"], one.loss) for one in made.all] == [(3.0, 3.0), (2.0, 3.0)]


def test_a_short_part_of_all_rows_is_the_whole():
    made = evaluations(short=8)
    made.make(2, "epoch 1")
    assert made.all[0].loss == 2.0


def test_without_rows_there_is_no_evaluation(capsys):
    made = evaluations(short=None, whole=0)
    made.make(0, "before training")
    assert (made.all, made._metrics.logged, capsys.readouterr().out) == ([], [], "")


def test_a_resumed_run_goes_on_with_the_evaluations_and_losses_of_its_checkpoint():
    made, resumed = evaluations(short=None), evaluations(short=None)
    made.make(0, "before training")
    made.take_in(1.0)
    resumed.load_state_dict(json.loads(json.dumps(made.state_dict())))
    resumed.take_in(2.0)
    resumed.make(2, "epoch 1")
    assert [(one.step, one.train_loss) for one in resumed.all] == [(0, None), (2, 1.5)]


def test_sums_over_batches_are_made_in_fp64():
    def sums_of(engine: Engine, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": batch.sum(), "count": torch.tensor(len(batch))}

    # In fp32, 2 ** 24 + 1 is 2 ** 24.
    batches = [torch.tensor([2.0**24]), torch.tensor([1.0]), torch.tensor([1.0, 1.0])]
    assert sum_over_batches(Engine(), batches, sums_of) == {"sum": 2**24 + 3, "count": 4}
    assert sum_over_batches(Engine(), [], sums_of) == {}


@pytest.mark.parametrize("name", LOSSES)
def test_the_shown_loss_has_four_digits(name, capsys):
    made = evaluations(short=4)
    made.make(1, name, is_short=name == "short")
    assert f"{name}: eval_loss {LOSSES[name]:.4f}" in capsys.readouterr().out
