"""What the optimiser steps of a PPO step did, over all ranks."""

import torch
from torch import Tensor

from dschat.checkpoints.state import Placement
from dschat.distributed.collectives import max_across_ranks, sum_across_ranks
from dschat.distributed.device import current_device


class UpdateStatistics:
    """Sums and maxima over the optimiser steps of a PPO step, reduced over ranks once, when they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, **values: Tensor) -> None:
        """Add this rank's share."""
        for name, value in values.items():
            share = value.detach().double()
            self._sums[name] = self._sums[name] + share if name in self._sums else share

    def maximise(self, **values: Tensor) -> None:
        """Keep the largest seen."""
        for name, value in values.items():
            share = value.detach().double()
            self._maxima[name] = torch.maximum(self._maxima.get(name, share), share)

    def reduce(self) -> tuple[dict[str, float], dict[str, float]]:
        """Sums and maxima over all ranks. Every rank must call it."""
        sums = sum_across_ranks(torch.stack(list(self._sums.values())), axis="data").tolist()
        maxima = []
        if self._maxima:  # none while the actor waits for the critic, on any rank
            maxima = max_across_ranks(torch.stack(list(self._maxima.values())), axis="data").tolist()
        return dict(zip(self._sums, sums, strict=True)), dict(zip(self._maxima, maxima, strict=True))

    def placement(self, key: str) -> Placement:
        """A sum's share and a maximum's candidate differ from rank to rank."""
        return Placement.SUM if key.startswith("sum.") else Placement.MAX

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's shares so far, under "sum.NAME" and "maximum.NAME"."""
        sums = {f"sum.{name}": total for name, total in self._sums.items()}
        return sums | {f"maximum.{name}": value for name, value in self._maxima.items()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Go on from the shares that `state_dict` gave."""
        for key, value in state_dict.items():
            kind, _, name = key.partition(".")
            (self._sums if kind == "sum" else self._maxima)[name] = value.to(current_device())
