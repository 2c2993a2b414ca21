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

    def __getitem__(self, chosen: np.ndarray) -> pa.Table:
        """The rows of these numbers, in their order; negative ones count from the end. Raises `IndexError`.

        Arrow's `take` would copy whole columns of lists.
        """
        chosen = np.where(chosen < 0, chosen + len(self), chosen)
        if np.any((chosen < 0) | (chosen >= len(self))):
            raise IndexError(f"of {len(self)} rows, these are asked for: {chosen}")
        places = np.searchsorted(self._starts, chosen, side="right") - 1
        rows = (chosen - self._starts[places]).tolist()
        parts = [self._batches[place].slice(row, 1) for place, row in zip(places, rows, strict=True)]
        return pa.Table.from_batches(parts, schema=self.table.schema)

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, [N]."""
        return array_of(self.table[name])

    def lengths(self, name: str) -> np.ndarray:
        """The lengths of a column's lists, [N]."""
        return array_of(pc.list_value_length(self.table[name]))

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        return self.table.to_batches()

    @cached_property
    def _starts(self) -> np.ndarray:
        """The number of each batch's first row."""
        return np.cumsum([0, *(batch.num_rows for batch in self._batches)])[:-1]


def array_of(values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Numbers or truth values as an array [N]. `to_numpy` would import pandas, as would joining no chunks."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks() if values.num_chunks else pa.nulls(0, values.type)
    if pa.types.is_boolean(values.type):  # bits, of which numpy has none
        return np.from_dlpack(values.cast(pa.uint8())).astype(bool)
    return np.from_dlpack(values)
