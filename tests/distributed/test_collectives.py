"""Collectives on two ranks, and on one."""

import json

import pytest
import torch
from processes import ROOT, python
from safetensors import SafetensorError

from dschat.distributed import collectives

WORKER = ROOT / "tests" / "workers" / "collectives.py"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("collectives")
    python(WORKER, folder, ranks=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_collectives_on_two_ranks(two_ranks):
    for result in two_ranks:
        assert result["sum"] == [3, 30]
        assert result["max"] == [-1, -10]
        assert result["largest"] == 5
        assert result["gathered"] == [[1, 10], [2, 20]]
        assert result["flags"] == [True, False]
        assert result["texts"] == ["0", "néné1"]
        assert result["broadcast"] == {"rank": 0}
        # The values of tests/test_statistics.py, dealt to two ranks: clustered there as on one.
        assert result["standard_error"] == pytest.approx((1.04 * 3 / 2) ** 0.5 / 5)
    own = [[1, 10], [2, 20]]
    assert [result["of data and of tensor ranks"] for result in two_ranks] == [[row, [3, 30]] for row in own]
    # d (a + b)^2 / da = 2 (a + b): of this rank's summand, not of all.
    assert [result["differentiable sum"] for result in two_ranks] == [[[3, 30], [6, 60]]] * 2
    assert [result["is_main"] for result in two_ranks] == [True, False]


def test_what_goes_wrong_with_files_is_said_to_all_ranks():
    def full() -> None:
        raise SafetensorError("no room")

    assert collectives.first_error_across_ranks(full, axis="world") == "rank 0: no room"
    assert collectives.first_error_across_ranks(lambda: None, axis="world") is None
    assert (
        collectives.first_error_across_ranks(lambda: "a folder is missing", axis="world")
        == "rank 0: a folder is missing"
    )


def test_one_rank_gets_its_own_values_back():
    values = torch.tensor([3.0, -1.0])
    assert collectives.gather_rows(values, axis="data").tolist() == [3, -1]
    total = collectives.sum_across_ranks(values.bfloat16(), axis="data")
    assert (total.tolist(), total.dtype) == ([3, -1], torch.float64)
    assert collectives.largest_across_ranks(7, values.device, axis="tensor") == 7
    # JSON makes lists of tuples, on one rank as on several.
    assert collectives.all_gather_object({"a": (1, 2)}, axis="world") == [{"a": [1, 2]}]
    assert collectives.broadcast_from_rank_0(lambda: None) is None
