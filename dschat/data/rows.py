"""Rows of token ids as training reads them: Arrow columns on disk, without the library that wrote them.

`datasets` takes 60 MiB and half a second to import, and what is kept is Arrow's own format.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True)
class Rows:
    """N rows. Those that are asked for are read, and no others, however large the table is."""

    table: pa.Table

    @staticmethod
    def read(folder: Path) -> "Rows":
        """The rows that `datasets.Dataset.save_to_disk` wrote into a folder, mapped into memory.

        Raises `OSError`, `KeyError`, `ValueError` or `pa.ArrowException` where they cannot be read.
        """
        files = json.loads((folder / "state.json").read_text())["_data_files"]
        streams = (pa.memory_map(str(folder / file["filename"])) for file in files)
        return Rows(pa.concat_tables([pa.ipc.open_stream(stream).read_all() for stream in streams]))

    @staticmethod
    def from_dict(columns: dict[str, Any]) -> "Rows":
        """Rows in memory, of columns of equal length."""
        return Rows(pa.table(columns))

    @staticmethod
    def of(dataset: Any) -> "Rows":
        """The rows of a `datasets.Dataset`, copied into memory."""
        return Rows(dataset.with_format("arrow")[:])

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, numbers: np.ndarray) -> pa.Table:
        """The rows of these numbers, in their order; negative ones count from the end. Raises `IndexError`.

        Arrow's `take` would copy whole columns of lists.
        """
        numbers = np.where(numbers < 0, numbers + len(self), numbers)
        if np.any((numbers < 0) | (numbers >= len(self))):
            raise IndexError(f"of {len(self)} rows, these are asked for: {numbers}")
        places = np.searchsorted(self._starts, numbers, side="right") - 1
        rows = (numbers - self._starts[places]).tolist()
        parts = [self._batches[place].slice(row, 1) for place, row in zip(places, rows, strict=True)]
        return pa.Table.from_batches(parts, schema=self.table.schema)

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, [N]."""
        return self.table[name].to_numpy()

    def lengths(self, name: str) -> np.ndarray:
        """The lengths of a column's lists, [N]."""
        return pc.list_value_length(self.table[name]).to_numpy()

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        return self.table.to_batches()

    @cached_property
    def _starts(self) -> np.ndarray:
        """The number of each batch's first row."""
        return np.cumsum([0, *(batch.num_rows for batch in self._batches)])[:-1]
