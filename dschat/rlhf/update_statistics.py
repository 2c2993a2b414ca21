"""What the optimiser steps of a PPO step did, over all ranks."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dschat.distributed.collectives import max_across_ranks, sum_across_ranks
from dschat.distributed.device import current_device
from dschat.distributed.mesh import is_main_process


class UpdateStatistics:
    """Sums and maxima over the optimiser steps of a PPO step, reduced over ranks once, when they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        self._maxima: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))

    def add(self, **values: Tensor) -> None:
        """Add this rank's share."""
        for name, value in values.items():
            self._sums[name] = self._sums[name].to(value.device) + value.detach().double()

    def maximise(self, **values: Tensor) -> None:
        """Keep the largest seen."""
        for name, value in values.items():
            self._maxima[name] = torch.maximum(self._maxima[name].to(value.device), value.detach().double())

    def reduce(self) -> tuple[dict[str, float], dict[str, float]]:
        """Sums and maxima over all ranks. Every rank must call it."""
        sums = sum_across_ranks(torch.stack(list(self._sums.values())), axis="data").tolist()
        maxima = []
        if self._maxima:  # none while the actor waits for the critic, on any rank
            maxima = max_across_ranks(torch.stack(list(self._maxima.values())), axis="data").tolist()
        return dict(zip(self._sums, sums, strict=True)), dict(zip(self._maxima, maxima, strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's share so far."""
        sums = {f"sum.{name}": total for name, total in self._sums.items()}
        return sums | {f"maximum.{name}": value for name, value in self._maxima.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        for name, value in state.items():
            kind, _, figure = name.partition(".")
            (self._sums if kind == "sum" else self._maxima)[figure] = value.to(current_device())

    def load_parts(self, parts: Sequence[Mapping[str, Tensor]]) -> None:
        """Go on from what `state_dict` gave on each of another number of ranks: rank 0 takes the sums."""
        for name in parts[0]:
            kind, _, figure = name.partition(".")
            values = torch.stack([part[name] for part in parts]).to(current_device())
            if kind == "maximum":
                self._maxima[figure] = values.max()
            else:
                self._sums[figure] = values.sum() if is_main_process() else torch.zeros_like(values[0])
