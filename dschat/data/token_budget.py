"""Micro-batches by tokens: the rows of an optimiser step, divided so that no part takes more than a budget.

The rows of a step and what each rank reads of them stay those of `dschat.data.loaders`. The division follows
from lengths alone, which every rank knows, so ranks agree on the number of parts without asking each other.
"""

from dataclasses import dataclass

import numpy as np

from dschat.data.packing import PADDED, RowLayout
from dschat.data.rows import Rows
from dschat.errors import UserError

SEQUENCES = ("input_ids", "chosen_ids", "rejected_ids")
"""Columns of tokens that a model reads; the last two are those of a pair."""


@dataclass(frozen=True)
class TokenBudget:
    """How many tokens, padding included, a rank may pass through the model at once."""

    num_tokens: int
    lengths: np.ndarray
    """[N, S]: the tokens of each example's sequences, of which a pair has two."""
    layout: RowLayout = PADDED
    """That of the rows that the model reads."""
    num_sharing: int = 1
    """Ranks that share the tokens of rows: each passes its part of them."""

    @staticmethod
    def of(dataset: Rows, num_tokens: int, num_sharing: int) -> "TokenBudget":
        """A budget for examples with columns of `SEQUENCES`."""
        lengths = [dataset.lengths(name) for name in SEQUENCES if name in dataset.table.column_names]
        return TokenBudget(num_tokens, np.stack(lengths, axis=1), num_sharing=num_sharing)

    def check(self, multiple_of: int) -> None:
        """Raise `UserError` where the longest example may take more than the budget by itself.

        It is padded to a multiple of so many tokens; the two sequences of a pair are counted as equally long.
        """
        longest, num_sequences = int(self.lengths.max(initial=1)), self.lengths.shape[1]
        needed = -(-num_sequences * RowLayout(multiple_of).rounded(longest) // self.num_sharing)
        if needed <= self.num_tokens:
            return
        rows = "it takes" if num_sequences == 1 else f"the {num_sequences} rows of a pair take"
        raise UserError(
            f"--max_tokens_per_batch {self.num_tokens} is too small: the longest row has {longest} tokens; "
            f"padded to a multiple of {multiple_of} {rows} {needed}. Give {needed} or more, or cut rows "
            "with a lower --max_seq_len."
        )

    def divided(self, step: np.ndarray, world_size: int) -> list[list[np.ndarray]]:
        """Each rank's micro-batches of an optimiser step, the numbers of their examples.

        `step` holds those of all ranks, the longest first; neighbours go to different ranks. Every rank has
        as many micro-batches: those of a rank that needs fewer end with empty ones.
        """
        shares = [self._parts(step[rank::world_size]) for rank in range(world_size)]
        number = max(map(len, shares))
        return [parts + [step[:0]] * (number - len(parts)) for parts in shares]

    def _parts(self, rows: np.ndarray) -> list[np.ndarray]:
        parts = []
        while len(rows):
            size = self._number_that_fit(rows)
            parts.append(rows[:size])
            rows = rows[size:]
        return parts

    def _number_that_fit(self, rows: np.ndarray) -> int:
        """How many of the first examples fit the budget together; at least 1, for which `check` answers."""
        num_tokens = self.lengths[rows].sum(axis=1).cumsum()  # without padding
        most = self.num_tokens * self.num_sharing
        number = int(np.searchsorted(num_tokens, most, side="right"))
        while number > 1 and self.layout.num_places(self.lengths[rows[:number]].ravel()) > most:
            number -= 1
        return max(1, number)
