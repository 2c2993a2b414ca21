"""What parts keep over ranks, without a checkpoint's files."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dschat.checkpoints.state import Placement, Progress, collect


class Part:
    """A part with a state that it is given, and placements of its tensors by key."""

    def __init__(self, state: dict[str, Any], **placements: Placement) -> None:
        self.state, self.placements = state, placements

    def placement(self, key: str) -> Placement:
        return self.placements.get(key, Placement.REPLICATED)

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


class Counter:
    """A part of torch's protocol alone."""

    def __init__(self) -> None:
        self.count, self.seen = 3, torch.ones(2)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count, self.seen = state_dict["count"], state_dict["seen"]


def on_rank(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(size))


def test_values_and_tensors_stand_where_they_are_written():
    one, two = torch.ones(1), torch.zeros(2)
    part = Part({"beta": 0.1, "own": one, "alike.x": two}, own=Placement.SUM)
    states = collect({"part": part, "tensors": Part({"x": two}), "nothing": Part({}), "seconds": 3.5})
    assert states.values == {"part": {"beta": 0.1}, "seconds": 3.5}
    assert states.own == {"part.own": one}
    assert list(states.shared) == ["part.alike.x", "tensors.x"]


def test_on_as_many_ranks_a_part_gets_back_what_it_gave():
    saved = Counter()
    saved.count, saved.seen = 7, torch.arange(2.0)
    states = collect({"counter": saved})
    found = Counter()
    Progress(7, states.values, states.own, shared=states.shared).restore({"counter": found})
    assert (found.count, found.seen.tolist()) == (7, [0, 1])


def test_a_part_that_the_checkpoint_knows_nothing_of_stays_as_it_is():
    part, similar = Part({"new": 1}), {"partition.x": torch.ones(1)}
    Progress(1, {"other": {"x": 2}, "seconds": 1.0}, own=similar).restore({"part": part})
    assert part.state == {"new": 1}


@pytest.mark.parametrize(("rank", "total"), [(0, 5.0), (1, 0.0), (2, 0.0)])
def test_shares_of_a_sum_come_back_to_rank_0_and_maxima_to_all(rank, total, monkeypatch):
    on_rank(monkeypatch, rank, 3)
    by_rank = [
        {"part.sum": torch.tensor(s), "part.most": torch.tensor(m)} for s, m in [(2.0, 4.0), (3.0, 9.0)]
    ]
    part = Part({}, sum=Placement.SUM, most=Placement.MAX)
    Progress(1, by_rank=by_rank).restore({"part": part})
    assert {key: value.item() for key, value in part.state.items()} == {"sum": total, "most": 9.0}


@pytest.mark.parametrize(
    ("rank", "size", "piece"),
    # A weight of 5 elements: on 3 ranks 1 2 | 3 4 | 5 and padding, which on 2 ranks is 1 2 3 | 4 5 padding.
    [(0, 2, [1, 2, 3]), (1, 2, [4, 5, 0]), (0, 1, [1, 2, 3, 4, 5]), (3, 4, [0, 0])],
)
def test_shards_are_cut_anew_for_another_number_of_ranks(rank, size, piece, monkeypatch):
    on_rank(monkeypatch, rank, size)
    by_rank: list[dict[str, Tensor]] = [
        {"average.w": torch.tensor(values)} for values in ([1.0, 2.0], [3.0, 4.0], [5.0, 0.0])
    ]
    part = Part({"w": torch.full((len(piece),), 9.0)}, w=Placement.SHARDED)
    Progress(1, by_rank=by_rank).restore({"average": part})
    assert part.state["w"].tolist() == piece


def test_one_rank_that_saved_is_spread_over_more(monkeypatch):
    on_rank(monkeypatch, 1, 2)
    part = Part({}, sum=Placement.SUM)
    Progress(1, by_rank=[{"part.sum": torch.tensor(2.0)}]).restore({"part": part})
    assert part.state["sum"].item() == 0
