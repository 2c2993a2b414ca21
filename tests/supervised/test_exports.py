"""Which model steps 1 and 2 and DPO hand on."""

import json
from pathlib import Path

import pytest
import torch
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM

from dschat.arguments import parse_arguments
from dschat.data.preparation import SplitData
from dschat.data.rows import Rows
from dschat.export.upstream import verify_model
from dschat.export.verdict import Evaluation
from dschat.models.tokenizer import load_tokenizer
from dschat.supervised.exports import ModelExports
from dschat.supervised.settings import SupervisedSettings


@pytest.fixture
def base(tmp_path) -> Path:
    return save_tiny_model(tmp_path / "base")


class Run:
    """A run whose model is told from others by a mark, and which ends after step 30."""

    def __init__(self, base: Path, *flags: str, step: str = "reward") -> None:
        self.output = base.parent / "out"
        argv = [f"--model_name_or_path={base}", f"--output_dir={self.output}", *flags]
        rows = Rows.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6]]})
        self.model = AutoModelForCausalLM.from_pretrained(base)
        self.exports = ModelExports(
            SupervisedSettings.of(parse_arguments(step, argv)),
            self.model,
            load_tokenizer(str(base)),
            SplitData(rows, rows, {}, ""),
            verdict_of=lambda evaluations: f"good: by {len(evaluations)} evaluations",
        )
        self.evaluations: list[Evaluation] = []

    def evaluate(self, step: int, loss: float) -> None:
        with torch.no_grad():
            self.model.model.norm.weight.fill_(step)
        self.evaluations.append(Evaluation(step, {"eval_loss": loss}, loss, 0.5))
        self.exports.offer(self.evaluations)

    def finish(self) -> tuple[dict, float]:
        """The summary and the mark of what was exported."""
        self.exports.finish(30, self.evaluations, 1.0)
        model = AutoModelForCausalLM.from_pretrained(self.output)
        return json.loads((self.output / "summary.json").read_text()), model.model.norm.weight[0].item()


LOSSES = {0: 0.1, 10: 0.7, 20: 0.6, 30: 0.9}
"""The lowest is that of a model that has learned nothing; the best is that of step 20."""


def evaluated(base: Path, *flags: str, step: str = "reward") -> Run:
    run = Run(base, *flags, step=step)
    for number, loss in LOSSES.items():
        run.evaluate(number, loss)
    return run


@pytest.mark.slow
def test_step_2_exports_the_best_of_its_evaluations(base, capsys):
    summary, marked = evaluated(base).finish()
    assert (summary["model_step"], marked) == (20, 20)
    assert (summary["initial_eval_loss"], summary["eval_loss"], summary["last_eval_loss"]) == (0.1, 0.6, 0.9)
    assert summary["verdict"] == "good: by 3 evaluations"
    assert summary["last_verdict"] == "good: by 4 evaluations"
    output = base.parent / "out"
    assert not (output / "best").exists()
    assert not (output / "best.json").exists()
    card = (output / "README.md").read_text()
    assert "| model_step | 20 |" in card
    assert "| eval_loss | 0.6 |" in card
    told = capsys.readouterr().out
    assert "the exported model is that after step 20, of the lowest evaluation loss, 0.6" in told
    assert "verdict on the model after step 30, not exported: good: by 4" in told
    verify_model(str(output), "--actor_model_name_or_path", "language_model")  # promises hold


@pytest.mark.parametrize("step", ["sft", "dpo", "reward"])
def test_the_last_model_is_exported_where_that_is_asked_for_and_by_default_in_step_1_and_dpo(step, base):
    flags = ["--export_model=last"] if step == "reward" else []
    run = evaluated(base, *flags, step=step)
    assert not (run.output / "best").exists()
    summary, marked = run.finish()
    assert (summary["model_step"], summary["eval_loss"], marked) == (30, 0.9, 30)
    assert "last_eval_loss" not in summary


def test_without_evaluations_the_last_model_is_exported(base):
    run = Run(base)
    run.exports.offer(run.evaluations)
    summary, _ = run.finish()
    assert summary["model_step"] == 30
    assert "eval_loss" not in summary


def test_losses_that_are_not_finite_choose_nothing(base):
    run = Run(base)
    for number in (0, 10, 30):
        run.evaluate(number, float("nan"))
    summary, marked = run.finish()
    assert (summary["model_step"], marked) == (30, 30)


def resumed(base: Path, state: dict, evaluations: list[Evaluation]) -> Run:
    run = Run(base)
    run.evaluations = list(evaluations)
    run.exports.load_state_dict(json.loads(json.dumps(state)))
    return run


def test_a_run_goes_on_with_the_best_model_of_its_checkpoint(base):
    run = Run(base)
    for number in (0, 10, 20):
        run.evaluate(number, LOSSES[number])
    again = resumed(base, run.exports.state_dict(), run.evaluations)
    again.evaluate(30, 0.9)
    summary, marked = again.finish()
    assert (summary["model_step"], marked) == (20, 20)


def test_a_run_that_was_killed_after_its_export_exports_the_same_once_more(base):
    run = evaluated(base)
    state, evaluations = run.exports.state_dict(), run.evaluations
    run.finish()
    again = resumed(base, state, evaluations)
    summary, marked = again.finish()
    assert (summary["model_step"], marked) == (20, 20)
