"""Findings of reading a source beside its comparisons: counts, and the sentences that report them."""

import reprlib
from collections import Counter
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from dschat.data.cells import BadRow, Columns, is_blank
from dschat.data.comparisons import Comparison
from dschat.data.layouts import JUDGEMENTS, VERDICTS

HARMLESS = (  # noqa: SIM905
    "id _id ids idx index uid uuid guid key hash md5 sha256 row_id sample_id example_id prompt_id "
    "question_id query_id message_id conversation_id dialogue_id dialog_id thread_id post_id session_id "
    "user_id task_id annotation_id annotator annotator_id annotator_ids worker_id lead_time source "
    "sources dataset dataset_name data_source subset split origin provenance date datetime time timestamp "
    "tstamp created created_at created_utc updated updated_at url urls link lang language languages "
    "license licence author version meta metadata turn __index_level_0__"
).split()
"""Columns that say where a row comes from, and nothing that could be learned. In lower case."""

NUM_PLACES = 5
NUM_NAMED = 12
"""Places of bad rows, and columns and reasons, that a message names; the others are counted."""


@dataclass
class Findings:
    """Counts of the rows of one source. It is part of the report that is kept with the tokens."""

    dropped: Counter[str] = field(default_factory=Counter)
    """Sound rows of no use, by reason."""
    bad: Counter[str] = field(default_factory=Counter)
    """Rows that cannot be read, by reason; they are left out."""
    bad_places: list[str] = field(default_factory=list)
    """The first of them, each with its place and what is wrong."""
    unread: Counter[str] = field(default_factory=Counter)
    """Rows in which a column holds something that no step reads, by column."""
    beside_pairs: Counter[str] = field(default_factory=Counter)
    """Those of them that look as if they judged the answers of a pair."""
    unlearned: Counter[str] = field(default_factory=Counter)
    """Rows whose answer no step learns, by reason; step 3 has their prompts."""

    @property
    def num_left_out(self) -> int:
        """Number of rows that make no comparison."""
        return self.dropped.total() + self.bad.total()

    @property
    def reasons(self) -> dict[str, int]:
        """Numbers of rows that make no comparison, by reason."""
        return dict(self.dropped) | {f"bad row: {reason}": number for reason, number in self.bad.items()}

    def add_bad(self, place: str, problem: BadRow) -> None:
        """Count a row that is left out since it cannot be read."""
        self.bad[problem.reason] += 1
        if len(self.bad_places) < NUM_PLACES:
            self.bad_places.append(f"{place}: {problem}")

    def add_read(self, found: Comparison, unread: list[str]) -> None:
        """Count what a row holds beside its comparison."""
        self.unread.update(unread)
        if len(found.answers) > 1:
            self.beside_pairs.update(column for column in unread if column in JUDGEMENTS)
        if found.unlearned:
            self.unlearned[found.unlearned] += 1

    def as_json(self) -> dict[str, Any]:
        """The counts as a JSON object, for `Findings.of_json`."""
        return {name: copy(value) for name, value in vars(self).items()}

    @staticmethod
    def of_json(kept: Mapping[str, Any]) -> "Findings":
        """Findings from the JSON object of `as_json`."""
        values: dict[str, Any] = {
            name: value if isinstance(value, list) else Counter(value) for name, value in kept.items()
        }
        return Findings(**values)

    def lines(self, *, bad: bool = True) -> list[str]:
        """A sentence for each kind of finding except dropped rows; bad rows only with `bad`."""
        lines = []
        if self.unread:
            some = "column is" if len(self.unread) == 1 else "columns are"
            lines.append(f"{len(self.unread)} {some} not read: {_listed(self.unread)}")
        if self.beside_pairs:
            lines.append(
                f"WARNING: {_listed(self.beside_pairs)} may judge the answers of pairs and is not read: "
                "the order of each pair is what its columns or its list say (docs/data.md)"
            )
        for reason, number in self.unlearned.items():
            lines.append(f"{number} rows have {reason}: no step learns those, step 3 has their prompts")
        if bad and self.bad:
            reasons = ", ".join(f"{number} ({reason})" for reason, number in self.bad.most_common(NUM_NAMED))
            lines.append(f"{self.bad.total()} bad rows left out (--on_bad_row drop): {reasons}")
            lines += [f"  {place}" for place in self.bad_places]
        return lines


def unread_columns(row: Columns) -> list[str]:
    """Columns that are not blank, were not read, and do not only say where a row comes from."""
    return [
        column
        for column, value in row.items()
        if column not in row.asked and str(column).lower() not in HARMLESS and not is_blank(value)
    ]


def check_verdicts(row: Columns, unread: list[str]) -> None:
    """Raise `BadRow` for an unread column that judges the answers, unless it agrees with the pair."""
    for column in unread:
        if column in VERDICTS and column not in JUDGEMENTS:
            value = dict.__getitem__(row, column)
            if isinstance(value, str) and value.strip() in ("chosen", str(row.get("chosen")).strip()):
                continue
            raise BadRow(
                f'"{column}" seems to say which answer is better, but is not read, and the pair is read in '
                f"the order of its columns; it is {reprlib.repr(value)}. Give the answers as answer_a and "
                "answer_b beside it, call it otherwise, or say with --data_format that their order is right"
            )


def _listed(columns: Counter[str]) -> str:
    named = [
        f"`{reprlib.repr(column)[1:-1]}` ({number} rows)" for column, number in columns.most_common(NUM_NAMED)
    ]
    more = len(columns) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")
