"""Batches on another device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dschat.data.moving import moved


@dataclass(frozen=True)
class Part:
    numbers: Tensor
    more: Tensor | None = None


@dataclass(frozen=True)
class Whole:
    part: Part
    rows: Tensor
    denominator: float


def test_tensors_are_moved_at_any_depth_and_all_else_stays():
    whole = Whole(Part(torch.ones(2)), torch.zeros(3), 7.0)
    there = moved(whole, "meta")
    assert (there.rows.device.type, there.part.numbers.device.type) == ("meta", "meta")
    assert (there.part.more, there.denominator) == (None, 7.0)
    assert whole.rows.device.type == "cpu"
