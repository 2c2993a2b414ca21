import json
from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from processes import ROOT, python
from tiny import save_tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, get_scheduler

from dschat.arguments import ModelArguments, OptimizerArguments
from dschat.engines.build import parameter_groups, tell_of_long_warmup
from dschat.engines.step import take_steps_together
from dschat.models.loading import create_hf_model
from dschat.models.lora import add_lora

ARGS = ModelArguments(
    model_name_or_path="m", learning_rate=1e-5, weight_decay=0.1, lora_dim=4, lora_learning_rate=2e-4
)


@pytest.fixture
def model(tmp_path) -> nn.Module:
    folder = str(save_tiny_model(tmp_path, "opt"))
    return create_hf_model(AutoModelForCausalLM, folder, tiny_tokenizer())


def settings(groups: list[dict]) -> list[tuple[float, float]]:
    return [(group["lr"], group["weight_decay"]) for group in groups]


def test_matrices_decay_and_biases_and_norms_do_not(model):
    matrices, vectors = parameter_groups(model, ARGS)
    assert settings([matrices, vectors]) == [(1e-5, 0.1), (1e-5, 0.0)]
    assert {p.dim() for p in matrices["params"]} == {2}
    assert {p.dim() for p in vectors["params"]} == {1}


def test_adapters_have_a_learning_rate_of_their_own(model):
    add_lora(model, ARGS)
    groups = parameter_groups(model, ARGS)
    assert settings(groups) == [(2e-4, 0.1), (1e-5, 0.1), (1e-5, 0.0)]
    assert len(groups[0]["params"]) == 2 * 12  # A and B of six layers in each of two blocks
    assert all(4 in p.shape for p in groups[0]["params"])
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == sum(p.requires_grad for p in model.parameters())


def test_adapters_alone_are_one_group(model):
    add_lora(model, ARGS, only_optimize_lora=True)
    assert settings(parameter_groups(model, ARGS)) == [(2e-4, 0.1)]


def test_the_schedule_scales_every_group(model):
    add_lora(model, ARGS)
    optimizer = torch.optim.AdamW(parameter_groups(model, ARGS), lr=ARGS.learning_rate)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=4)
    optimizer.step()
    scheduler.step()
    # Three of four steps remain.
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1.5e-4, 0.75e-5, 0.75e-5])


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


def test_a_warm_up_of_most_of_the_run_is_said_once(capsys):
    default = OptimizerArguments(num_warmup_steps=100)
    for _ in ("actor", "critic"):
        tell_of_long_warmup(default, default.warmup_steps(8), 8)
    said = capsys.readouterr().out
    assert said.count("note: warm-up takes 8 of the run's 8 optimiser steps (--num_warmup_steps 100)") == 1
    share = OptimizerArguments(warmup_ratio=0.6)
    tell_of_long_warmup(share, share.warmup_steps(10), 10)
    assert "6 of the run's 10 optimiser steps (--warmup_ratio 0.6)" in capsys.readouterr().out
    tell_of_long_warmup(default, default.warmup_steps(200), 200)
    assert capsys.readouterr().out == ""
