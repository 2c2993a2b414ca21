"""The known layouts, and how that of a row is found by its columns."""

from collections.abc import Callable
from dataclasses import dataclass

from dschat.data.cells import BadRow, Row
from dschat.data.comparisons import Comparison

ReadRow = Callable[[Row], Comparison]
Fits = Callable[[Row], bool]


@dataclass(frozen=True)
class Layout:
    """A way to read rows that have certain columns."""

    name: str
    columns: tuple[str, ...]
    """What a row must have; where `fits` decides, an example of it."""
    read: ReadRow
    fits: Fits | None = None
    """Whether a row is of this layout, where its columns may have several names."""

    def matches(self, row: Row) -> bool:
        """Whether the row has what this layout reads."""
        return set(self.columns) <= set(row) if self.fits is None else self.fits(row)


LAYOUTS: dict[str, Layout] = {}
"""The known layouts by name, in the order in which they are tried."""


def layout(name: str, *columns: str, fits: Fits | None = None) -> Callable[[ReadRow], ReadRow]:
    """Register the function below as the layout of rows with these columns."""

    def register(read: ReadRow) -> ReadRow:
        LAYOUTS[name] = Layout(name, columns, read, fits)
        return read

    return register


def recognise(row: Row) -> Layout:
    """The layout of a row by its columns. Raises `BadRow` where none fits."""
    for known in LAYOUTS.values():
        if known.matches(row) and not _half_a_pair(known, row):
            return known
    found = ", ".join(name if len(name) <= 60 else f"{name[:60]}..." for name in map(str, row)) or "none"
    others = [known for known in LAYOUTS.values() if not known.matches(row)]
    closest = max(others, key=lambda known: (len(set(known.columns) & set(row)), -len(known.columns)))
    missing = ", ".join(f'"{column}"' for column in closest.columns if column not in row)
    listed = "; or ".join(", ".join(known.columns) for known in LAYOUTS.values())
    raise BadRow(
        f"the row has no {missing}; its columns are: {found}; --prompt_key, --chosen_key, --rejected_key and "
        f"--messages_key name columns that are called otherwise; the known layouts are: {listed}"
        + "".join(
            f'; if the rows are the objects in "{name}", save that list alone'
            for name, value in row.items()
            if isinstance(value, list) and value and isinstance(value[0], dict)
        )
    )


def _half_a_pair(known: Layout, row: Row) -> bool:
    """Whether the layout would overlook that one answer of a pair is missing."""
    overlooks = "chosen" not in known.columns and known.fits is None
    return overlooks and ("chosen" in row) != ("rejected" in row)
