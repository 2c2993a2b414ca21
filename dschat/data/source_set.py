"""The data sets of a run as one stream of comparisons, numbered by their order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from dschat.arguments import DataArguments
from dschat.data.comparisons import Comparison, ComparisonIndex
from dschat.data.files import Rows
from dschat.data.findings import Findings
from dschat.data.reading import Format, read_comparisons, read_rows
from dschat.data.report import listed
from dschat.data.sources import Source, open_source
from dschat.errors import UserError


@dataclass(frozen=True)
class SourceSet:
    """The opened data sets, in the order in which their comparisons are numbered."""

    shared: list[Source]
    """Those of --data_path, which all steps know."""
    evaluation: list[Source]
    """Those of --eval_data_path."""
    own: list[Source]
    """Those of step 1 alone, or of DPO."""

    @staticmethod
    def open(data: DataArguments, own_data_path: Sequence[str]) -> "SourceSet":
        """Open all data sets. Raises `UserError`."""
        return SourceSet(
            [open_source(entry) for entry in data.data_path],
            [open_source(entry, "--eval_data_path", evaluates=True) for entry in data.eval_data_path],
            [open_source(entry, "--sft_only_data_path") for entry in own_data_path],
        )

    @property
    def all(self) -> list[Source]:
        """Every source; its index is its number."""
        return [*self.shared, *self.evaluation, *self.own]

    @property
    def identities(self) -> dict[str, list[list[Any]]]:
        """What decides the comparisons of the sources, for the cache's key."""
        groups = {"sources": self.shared, "evaluation": self.evaluation, "own": self.own}
        return {
            name: [[s.fingerprint, s.weight, s.read and s.read.__name__] for s in sources]
            for name, sources in groups.items()
        }

    def are_for_evaluation(self, number: int) -> bool:
        """Whether the source of that number is one of --eval_data_path."""
        return len(self.shared) <= number < len(self.shared) + len(self.evaluation)

    def comparisons(
        self, form: Format, findings: Sequence[Findings]
    ) -> Iterator[tuple[Comparison, int, bool]]:
        """Every comparison of every source, with the source's number and whether it is for evaluation.

        Fills the findings, one a source. Raises `UserError` as `read_comparisons` does.
        """
        for number, source, rows, in_evaluation in self._parts():
            for comparison in read_comparisons(source, rows, form, findings[number]):
                yield comparison, number, in_evaluation

    def place_of(self, number: int, form: Format) -> str:
        """Where the comparison of that number stands, such as "pairs.jsonl:3".

        Reads the sources once more: comparisons carry no place through work that hardly ever fails.
        """
        places = (
            place
            for _, source, rows, _ in self._parts()
            for place, found in read_rows(source, rows, form, Findings())
            if isinstance(found, Comparison)
        )
        return next(islice(places, number, None))

    def check(self, index: ComparisonIndex, findings: Sequence[Findings]) -> None:
        """Raise `UserError` for a source without rows to train on, or to evaluate on."""
        for number, source in enumerate(self.all):
            use = "evaluate" if self.are_for_evaluation(number) else "train"
            if not np.any((index.sources == number) & (index.in_evaluation == (use == "evaluate"))):
                problem = f"{source.flag} {source.name} holds no rows to {use} on"
                why = listed(": dropped", findings[number].reasons)
                raise UserError(f"{problem}{why}; leave it out or give another file.")

    def _parts(self) -> Iterator[tuple[int, Source, Rows, bool]]:
        """All rows that are read, in order, with their source, its number, and whether they evaluate."""
        for number, source in enumerate(self.all):
            if self.are_for_evaluation(number):
                yield number, source, source.evaluation or source.training, True
            else:
                yield number, source, source.training, False
                if source.evaluation is not None and not self.evaluation:
                    yield number, source, source.evaluation, True
