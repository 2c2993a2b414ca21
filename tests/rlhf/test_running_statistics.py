import pytest
import torch

from dschat.rlhf.running_statistics import RunningStatistics


def test_batches_add_up_to_the_statistics_of_the_whole():
    # 1 3 and 8: mean 4, squares 9 + 1 + 16 = 26
    statistics = RunningStatistics()
    statistics.update(torch.tensor([1.0, 3.0]))
    assert (statistics.mean, statistics.squares) == (2, 2)
    statistics.update(torch.tensor([8.0]))
    assert (statistics.count, statistics.mean) == (3, pytest.approx(4))
    assert statistics.std == pytest.approx((26 / 3) ** 0.5)


def test_a_large_mean_costs_no_precision():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e6
    statistics = RunningStatistics()
    for batch in values.split(7):
        statistics.update(batch)
    assert statistics.mean == pytest.approx(values.mean().item(), rel=1e-12)
    assert statistics.std == pytest.approx(values.std(unbiased=False).item(), rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_equal_values_are_not_scaled(value):
    statistics = RunningStatistics()
    for _ in range(3):
        statistics.update(torch.full((3,), value))
    assert statistics.std == 1
    assert RunningStatistics().std == 1
