"""Rows that the tokenizer or the chat template refuses: the first ends the work, or all are marked."""

from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dschat.data.truncation import Truncation
from dschat.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

Columns = dict[str, list]


class RowError(UserError):
    """A row cannot be tokenised: its number among the rows, and why. It can be pickled."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"row {number + 1} cannot be tokenised: {reason}")
        self.number, self.reason = number, reason

    def __reduce__(self) -> tuple[type, tuple[int, str]]:
        return RowError, (self.number, self.reason)


def encode_rows(
    batch: Columns,
    indices: list[int],
    encode: Callable[..., Columns],
    *,
    with_indices: bool,
    marked_as: dict[str, pa.DataType] | None = None,
) -> Columns:
    """Encode a batch of rows. Raises `RowError` for the first row that fails by itself.

    With `marked_as`, the columns of the result, such rows are empty instead and marked `Truncation.REFUSED`,
    with the reason in the column unshown.
    """

    def encoded(rows: Columns, numbers: list[int]) -> Columns:
        return encode(rows, numbers) if with_indices else encode(rows)

    try:
        return encoded(batch, indices)
    except Exception:
        parts, num_refused = [], 0
        for place, number in enumerate(indices):
            try:
                one = {name: values[place : place + 1] for name, values in batch.items()}
                parts.append(encoded(one, [number]))
            except Exception as error:
                reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                if marked_as is None:
                    raise RowError(number, reason) from error
                parts.append(_mark(marked_as, number, reason))
                num_refused += 1
        if num_refused == 0:
            raise  # no row by itself
        return {name: list(chain.from_iterable(part[name] for part in parts)) for name in parts[0]}


def _mark(columns: dict[str, pa.DataType], number: int, reason: str) -> Columns:
    def nothing(kind: pa.DataType) -> Any:
        return [] if pa.types.is_list(kind) else "" if pa.types.is_string(kind) else 0

    row = {name: nothing(kind) for name, kind in columns.items()}
    row |= {"prompt_size": 2**31 - 1, "unshown": f"{number} {reason}", "truncation": Truncation.REFUSED}
    return {name: [value] for name, value in row.items()}


def refused_rows(marked: "Dataset", truncations: np.ndarray) -> dict[int, str]:
    """Reasons of the rows that `encode_rows` marked, by row number; `truncations` [N] are of all rows."""
    reasons = marked.select(np.flatnonzero(truncations == Truncation.REFUSED))["unshown"]
    return {int(number): reason for number, _, reason in (text.partition(" ") for text in reasons)}
