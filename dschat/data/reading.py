"""Rows of a source as a stream of comparisons, with findings about the rows."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dschat.arguments import DataArguments
from dschat.data.cells import BadRow, Columns, DroppedRow, Row
from dschat.data.comparisons import Comparison
from dschat.data.files import Rows
from dschat.data.findings import Findings, check_verdicts, unread_columns
from dschat.data.known_sets import KNOWN_SETS
from dschat.data.layouts import LAYOUTS, Layout, ReadRow, recognise
from dschat.data.sources import Source
from dschat.data.tools import with_tools
from dschat.errors import UserError


@dataclass(frozen=True)
class Format:
    """Flags that decide how rows are read, where their columns do not."""

    name: str | None = None
    """A layout or a known data set, None for what the columns tell."""
    keys: tuple[tuple[str, str], ...] = ()
    """(the name a layout uses, the name in the data) of columns."""
    keep_rows: bool = False
    """Whether comparisons keep the rows that they were made of, so that all columns are used."""
    drop_bad_rows: bool = False
    """Whether rows that cannot be read are left out and counted."""

    @staticmethod
    def of(data: DataArguments) -> "Format":
        """From --data_format and the flags that name columns. Raises `UserError` for an unknown format."""
        if data.data_format is not None and data.data_format not in {**LAYOUTS, **KNOWN_SETS}:
            raise UserError(
                f"--data_format {data.data_format!r} is unknown; choose a layout ({', '.join(LAYOUTS)}) or a "
                f"known data set ({', '.join(KNOWN_SETS)})."
            )
        keys = {
            "prompt": data.prompt_key,
            "chosen": data.chosen_key,
            "rejected": data.rejected_key,
            "messages": data.messages_key,
        }
        given = tuple((ours, theirs) for ours, theirs in keys.items() if theirs)
        return Format(data.data_format, given, drop_bad_rows=data.on_bad_row == "drop")

    def read_function(self) -> ReadRow | None:
        """What reads a row, None where the columns are to tell."""
        if self.name is None:
            return None
        return (LAYOUTS if self.name in LAYOUTS else KNOWN_SETS)[self.name].read

    def renamed(self, row: Row) -> Columns:
        """The row under the names that layouts use. Raises `BadRow` for a missing column."""
        for ours, theirs in self.keys:
            if theirs not in row:
                raise BadRow(f'the row has no "{theirs}" (--{ours}_key)')
        renamed = Columns({**row, **{ours: row[theirs] for ours, theirs in self.keys}})
        renamed.asked.update(theirs for _, theirs in self.keys)
        return renamed


def read_comparisons(source: Source, rows: Rows, form: Format, findings: Findings) -> Iterator[Comparison]:
    """Stream the source's rows as comparisons; what is found on the way is added to `findings`.

    Raises `UserError` with file and line for what cannot be read, unless such rows are to be left out.
    """
    for place, found in read_rows(source, rows, form, findings):
        if isinstance(found, BadRow):
            if not form.drop_bad_rows:
                raise UserError(
                    f"{place}: {found}. Correct the row or remove it, or leave out all such rows with "
                    "--on_bad_row drop."
                ) from found
            findings.add_bad(place, found)
        elif isinstance(found, DroppedRow):
            findings.dropped[str(found)] += 1
        else:
            yield found


def read_rows(
    source: Source, rows: Rows, form: Format, findings: Findings
) -> Iterator[tuple[str, Comparison | BadRow | DroppedRow]]:
    """Stream what the source's rows are, each with its place; columns that are not read go into `findings`.

    They are read as `form` says, else as is known of the source, else by the columns of the first row.
    """
    read, layout = form.read_function() or source.read, None
    for place, row in rows():
        try:
            if isinstance(row, BadRow):
                raise row
            if not isinstance(row, dict):
                raise BadRow(f"the row is no JSON object, but {json.dumps(row)[:60]}")
            columns = form.renamed(row)
            if read is None:
                layout = recognise(columns)
                read = layout.read
            elif layout is not None:
                _check_layout(layout, columns)
            found = with_tools(read(columns), columns)
            unread = _unread(columns, found, layout)
            if form.keep_rows:
                found = replace(found, row=json.dumps(row, default=str))
            else:
                findings.add_read(found, unread)
            yield place, found
        except (BadRow, DroppedRow) as problem:
            yield place, problem


def _check_layout(layout: Layout, row: Row) -> None:
    """Raise `BadRow` where the layout of the first row would overlook the answers of this one."""
    if layout is LAYOUTS["prompt_only"] and (other := recognise(row)) is not layout:
        raise BadRow(
            f"the row has {', '.join(other.columns)}, but the first row a prompt alone, so the layout is "
            "prompt_only; put rows with answers into another file, or give --data_format prompt_only to use "
            "their prompts alone"
        )


def _unread(row: Columns, found: Comparison, layout: Layout | None) -> list[str]:
    """The columns of the row that may matter and were not read. Raises `BadRow` where one says which answer
    of a pair is better, unless the layout goes by such a column or does not follow from the columns."""
    unread = unread_columns(row)
    by_order = layout is not None and layout is not LAYOUTS["two_answers"]
    if by_order and len(found.answers) > 1:
        check_verdicts(row, unread)
    return unread
