"""An optimiser step: what is summed, what is scaled, and when it is taken."""

import json
from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from processes import ROOT, python
from torch import Tensor

from dschat.engines.step import skipped_because, take_steps_together, train_step


class AveragingEngine:
    """One weight, trained by gradient descent of rate 0.5; gradients are averaged as DeepSpeed does."""

    device = torch.device("cpu")
    optimizer = None

    def __init__(self, accumulation_steps: int) -> None:
        self.weight = torch.ones(1, requires_grad=True)
        self.num_bad_losses, self.skip_reason, self.is_training = 0, "loss", False
        self._accumulation_steps, self._at_boundary, self._is_applied = accumulation_steps, True, False

    def train(self) -> None:
        self.is_training = True

    def gradient_accumulation_steps(self) -> int:
        return self._accumulation_steps

    def is_gradient_accumulation_boundary(self) -> bool:
        return self._at_boundary

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self._at_boundary = is_boundary

    def backward(self, loss: Tensor) -> None:
        (loss / self._accumulation_steps).backward()

    def was_step_applied(self) -> bool:
        return self._is_applied

    @torch.no_grad()
    def step(self) -> None:
        self._is_applied = self.is_gradient_accumulation_boundary() and bool(self.weight.grad.isfinite())
        if self.is_gradient_accumulation_boundary():
            if self._is_applied:
                self.weight -= 0.5 * self.weight.grad
            self.weight.grad = None


def shares(engine: AveragingEngine, values: Tensor) -> dict[str, Tensor]:
    """Shares of the mean of w * x over three numbers x, and of their mean square."""
    return {"loss": (engine.weight * values).sum() / 3, "square": (values**2).sum() / 3}


def test_a_step_learns_from_the_sum_of_its_micro_batches_and_returns_it():
    engine = AveragingEngine(accumulation_steps=2)
    micro_batches = [torch.tensor([1.0, 2.0]), torch.tensor([6.0])]
    metrics = train_step(engine, micro_batches, lambda batch: shares(engine, batch))
    # (1 + 2 + 6) / 3 = 3 and (1 + 4 + 36) / 3; the slope is 3, of which half is taken off.
    assert metrics == pytest.approx({"loss": 3.0, "square": 41 / 3})
    assert list(metrics) == ["loss", "square"]
    assert engine.weight.item() == pytest.approx(1 - 0.5 * 3)
    assert engine.is_training
    assert skipped_because(engine) is None


def test_however_a_step_is_divided_it_learns_the_same():
    whole, divided = AveragingEngine(1), AveragingEngine(3)
    values = torch.tensor([1.0, 2.0, 6.0])
    at_once = train_step(whole, [values], lambda batch: shares(whole, batch))
    in_parts = train_step(divided, values.split(1), lambda batch: shares(divided, batch))
    assert at_once == pytest.approx(in_parts)
    assert whole.weight.item() == pytest.approx(divided.weight.item())


def test_steps_may_have_any_number_of_micro_batches():
    engine, values = AveragingEngine(accumulation_steps=2), torch.tensor([1.0, 2.0, 6.0])
    for parts in ([1, 1, 1], [3], [2, 1]):
        before = engine.weight.item()
        train_step(engine, values.split(parts), lambda batch: shares(engine, batch))
        assert engine.weight.item() == pytest.approx(before - 0.5 * 3)


def test_a_loss_that_is_not_finite_is_why_a_step_is_skipped():
    engine = AveragingEngine(accumulation_steps=2)
    micro_batches = [torch.tensor([float("nan")]), torch.tensor([6.0])]
    train_step(engine, micro_batches, lambda batch: shares(engine, batch))
    assert skipped_because(engine) == "loss"
    assert engine.weight.item() == 1
    train_step(engine, [torch.tensor([1.0]), torch.tensor([2.0])], lambda batch: shares(engine, batch))
    assert skipped_because(engine) is None


class FakeEngine:
    """An fp16 engine whose optimiser looks for overflow, and lowers its scale, as DeepSpeed's does."""

    def __init__(self, overflows: bool, *, at_boundary: bool = True) -> None:
        self.optimizer, self.checks, self.steps = self, 0, []
        self.loss_scaler = SimpleNamespace(cur_scale=8.0, cur_iter=5)
        self._overflows, self._at_boundary = overflows, at_boundary
        self.num_bad_losses, self.skip_reason = torch.zeros((), dtype=torch.int32), None

    def was_step_applied(self) -> bool:
        return self.steps[-1] == "taken"

    def is_gradient_accumulation_boundary(self) -> bool:
        return self._at_boundary

    def has_overflow(self) -> bool:
        self.checks += 1
        return self._overflows

    def step(self) -> None:
        overflows = self._at_boundary and self.has_overflow()
        self.steps.append("skipped" if overflows else "taken")
        self.loss_scaler.cur_iter += 1
        self.loss_scaler.cur_scale *= 0.5 if overflows else 1


@pytest.mark.parametrize(
    ("overflows", "steps", "scales"),
    [
        ((False, False), "taken", (8, 8)),
        ((True, False), "skipped", (4, 8)),
        ((True, True), "skipped", (4, 4)),
    ],
)
def test_steps_are_taken_or_skipped_together_and_only_the_guilty_scale_falls(overflows, steps, scales):
    engines = [FakeEngine(overflowed) for overflowed in overflows]
    take_steps_together(engines)
    assert [engine.steps for engine in engines] == [[steps], [steps]]
    assert tuple(engine.loss_scaler.cur_scale for engine in engines) == scales
    assert [engine.has_overflow() for engine in engines] == list(overflows)  # its own answer again


def test_between_boundaries_nobody_looks_for_overflow():
    engines = [FakeEngine(True, at_boundary=False), FakeEngine(False, at_boundary=False)]
    take_steps_together(engines)
    assert [(engine.checks, engine.steps) for engine in engines] == [(0, ["taken"])] * 2


STAGES = [[0, 1], [1, 0], [2, 3], [3, 2]]


@pytest.mark.skipif(not get_accelerator().is_fp16_supported(), reason="this machine has no fp16")
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_overflow_of_one_engine_skips_the_step_of_both(ranks, tmp_path):
    python(ROOT / "tests" / "workers" / "overflows.py", tmp_path / "out", json.dumps(STAGES), ranks=ranks)
    for first, second, third in json.loads((tmp_path / "out").read_text()):
        assert [step["overflows"] for step in (first, second, third)] == [
            [False] * 2,
            [False, True],
            [False] * 2,
        ]
        for number in range(2):
            before, skipped, after = (step["engines"][number] for step in (first, second, third))
            assert (before["skipped"], skipped["skipped"], after["skipped"]) == (0, 1, 1)
            assert skipped["weights"] == before["weights"] != after["weights"]
            assert skipped["lr"] == before["lr"] == 2 * after["lr"]
        waited, overflowed = second["engines"]
        assert waited["scale"] == 2**16
        assert overflowed["scale"] == 2**15


def test_steps_in_fp16_are_those_in_fp32_up_to_rounding(tmp_path):
    """At ZeRO 0, where DeepSpeed's backward pass does not scale the loss, and at 1."""
    python(ROOT / "tests" / "workers" / "fp16_steps.py", tmp_path / "out")
    expected, *found = json.loads((tmp_path / "out").read_text())
    assert len(found) == 2
    for numbers in found:
        assert numbers == pytest.approx(expected, rel=1e-2)
