"""Mean and spread of all scores so far."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class RunningStatistics:
    """Mean and population standard deviation of a stream, batch after batch, without keeping it.

    Welford's method for batches (Chan, Golub and LeVeque 1979). The three numbers are the whole state.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared distances from the mean."""

    def update(self, values: Tensor) -> None:
        """Take in a batch [B]. Hand every rank the batch of all ranks, and their statistics stay alike."""
        batch = values.double()
        count, mean = self.count + len(batch), batch.mean().item()
        apart = mean - self.mean
        self.squares += ((batch - mean) ** 2).sum().item() + apart**2 * self.count * len(batch) / count
        self.mean += apart * len(batch) / count
        self.count = count

    @property
    def std(self) -> float:
        """1 where all values so far are equal: nothing is to be scaled then."""
        std = (self.squares / max(self.count, 1)) ** 0.5
        return std if std > 1e-9 * max(abs(self.mean), 1) else 1.0
