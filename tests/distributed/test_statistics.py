"""Standard errors against hand-made numbers."""

import math

import pytest
import torch

from dschat.distributed.statistics import standard_error


def test_values_of_one_group_are_one_observation_however_many_they_are():
    # Mean 0.6; residuals 0.4 0.4 | -0.6 0.4 | -0.6, of groups 0.8, -0.2, -0.6: squares 0.64 + 0.04 + 0.36 =
    # 1.04, times 3/2 is 1.56; sqrt(1.56) / 5.
    values, groups = torch.tensor([1.0, 0, 1, 0, 1]), torch.tensor([7, 2, 7, 5, 2])
    assert standard_error(values, groups).item() == pytest.approx(math.sqrt(1.56) / 5)


def test_a_value_a_group_gives_the_usual_standard_error():
    values = torch.tensor([1.0, 2, 4, 9])  # mean 4, squares 9 + 4 + 0 + 25 = 38, s^2 = 38 / 3
    error = standard_error(values, torch.arange(4)).item()
    assert error == pytest.approx(math.sqrt(38 / 3 / 4))
    assert error == pytest.approx(values.std().item() / 2)


def test_copies_of_every_value_make_nothing_surer():
    values = torch.tensor([1.0, 2, 4, 9])
    copied = standard_error(values.repeat(10), torch.arange(4).repeat(10))
    assert copied.item() == pytest.approx(standard_error(values, torch.arange(4)).item())


def test_one_group_tells_nothing():
    assert standard_error(torch.tensor([0.0, 1]), torch.tensor([3, 3])).item() == 0
