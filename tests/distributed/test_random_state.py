"""Seeds of ranks, and random generators that go on where they stood."""

import json
import random

import numpy
import torch

from dschat.distributed import random_state


def test_equal_seeds_give_equal_draws():
    draws = []
    for _ in range(2):
        random_state.seed_everything(7)
        draws.append(torch.rand(3).tolist())
    assert draws[0] == draws[1]


def test_each_rank_draws_numbers_of_its_own_and_the_same_again(monkeypatch):
    draws = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1, 0):
        monkeypatch.setenv("RANK", str(rank))
        random_state.seed_ranks_apart(2**63 - 1)
        drawn = torch.rand(3).tolist()
        assert draws.setdefault(rank, drawn) == drawn
    assert draws[0] != draws[1]


def test_the_generators_go_on_where_they_stood_though_the_state_has_been_json():
    random_state.seed_everything(3)
    numpy.random.normal()  # leaves the second of a pair for the next call
    numbers, tensors = random_state.random_state()

    def draws() -> tuple[float, float, list[float]]:
        return random.random(), numpy.random.normal(), torch.rand(2).tolist()

    expected = draws()
    random_state.seed_everything(4)
    assert draws() != expected
    random_state.restore_random_state(json.loads(json.dumps(numbers)), tensors)
    assert draws() == expected
