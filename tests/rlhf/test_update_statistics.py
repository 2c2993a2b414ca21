import torch

from dschat.checkpoints.state import Progress, collect
from dschat.rlhf.update_statistics import UpdateStatistics


def some_statistics() -> UpdateStatistics:
    statistics = UpdateStatistics()
    for value in (1.0, 5.0, 3.0):
        statistics.add(total=torch.tensor(value))
        statistics.maximise(most=torch.tensor(value))
    return statistics


def test_statistics_add_up_and_keep_the_largest():
    assert some_statistics().reduce() == ({"total": 9.0}, {"most": 5.0})


def test_without_maxima_the_sums_alone_are_reduced():
    statistics = UpdateStatistics()
    statistics.add(total=torch.tensor(2.0))
    assert statistics.reduce() == ({"total": 2.0}, {})


def test_two_ranks_become_one_with_the_same_sums_and_maxima():
    by_rank = [collect({"statistics": some_statistics()}).own for _ in range(2)]
    by_rank[1]["statistics.maximum.most"] = torch.tensor(7.0, dtype=torch.float64)
    found = UpdateStatistics()
    Progress(1, by_rank=by_rank).restore({"statistics": found})
    assert found.reduce() == ({"total": 18.0}, {"most": 7.0})
