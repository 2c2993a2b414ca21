"""Learning-rate schedules are those of transformers."""

import pytest
import torch
from transformers import get_scheduler

from dschat.engines.schedule import learning_rate_schedule
from dschat.errors import UserError

TYPES = ("linear", "cosine", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial")


def optimizer(rate: float = 1e-3) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]}]
    groups.append({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate / 2})
    return torch.optim.AdamW(groups, lr=rate)


def rates(scheduler) -> list[list[float]]:
    found = []
    for _ in range(13):
        found.append(scheduler.get_last_lr())
        scheduler.optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("warmup", [0, 3])
def test_a_schedule_is_that_of_transformers_to_the_last_step_and_beyond(name, warmup):
    lengths = {"num_warmup_steps": warmup, "num_training_steps": 11}
    ours, theirs = (
        rates(make(name, optimizer(), **lengths)) for make in (learning_rate_schedule, get_scheduler)
    )
    assert [rate for step in ours for rate in step] == pytest.approx(
        [rate for step in theirs for rate in step], rel=1e-12, abs=1e-18
    )


def test_a_warm_up_of_the_whole_run_ends_at_its_peak():
    lengths = {"num_warmup_steps": 4, "num_training_steps": 4}
    for name in TYPES[1:]:
        assert rates(learning_rate_schedule(name, optimizer(), **lengths))[4][0] == pytest.approx(1e-3)


def test_a_polynomial_that_would_rise_is_refused():
    with pytest.raises(UserError, match="not below the learning rate 1e-08"):
        learning_rate_schedule("polynomial", optimizer(1e-8), num_warmup_steps=0, num_training_steps=4)
