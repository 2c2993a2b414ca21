"""How far a mean over answers or pairs may lie from the one over all prompts there are."""

import torch
from torch import Tensor

from dschat.distributed.collectives import gather_rows


def standard_error(values: Tensor, groups: Tensor) -> Tensor:
    """The standard error of the mean of `values`, clustered. [N], int64 [N] -> scalar, fp64.

    Values with one number in `groups`, such as those of the pairs of one prompt, may depend on one another:
    what they have in common is one observation, however often it stands there. With G groups it is
    sqrt(G / (G - 1) * sum over groups of (sum over the group of v - mean)^2) / N, the sandwich estimate of
    https://doi.org/10.1093/biomet/73.1.13 for a mean. With a value a group it is s / sqrt(N).
    0 where there is one group, which tells nothing of others.
    """
    residuals = (values.double() - values.double().mean()).cpu()  # one order of additions on every device
    _, places = groups.cpu().unique(return_inverse=True)
    num_groups = int(places.max()) + 1
    if num_groups < 2:
        return torch.zeros((), dtype=torch.float64)
    of_groups = torch.zeros(num_groups, dtype=torch.float64).index_add_(0, places, residuals)
    return (of_groups.square().sum() * num_groups / (num_groups - 1)).sqrt() / len(values)


class MeanOverRanks:
    """Batches of values on each rank, and how sure the mean of all of them is."""

    def __init__(self) -> None:
        self._batches: list[Tensor] = []

    def add(self, values: Tensor, *, groups: Tensor, mask: Tensor) -> None:
        """Take in [B] values with their groups where the mask is 1; every rank as many batches of a size."""
        self._batches.append(torch.stack([column.double() for column in (values, groups, mask)], dim=1))

    def standard_error(self) -> float:
        """`standard_error` over the values of all ranks. Every rank must call it."""
        return self.error_and_counts()[0]

    def error_and_counts(self) -> tuple[float, int, int]:
        """The standard error, and how many values and groups it is of. Every rank must call it."""
        table = gather_rows(torch.cat(self._batches), axis="data")
        values, groups, _ = table[table[:, 2] > 0].unbind(dim=1)
        return standard_error(values, groups.long()).item(), len(values), len(groups.unique())
