"""The prompts and pairs that the steps of a run held out, as text, for programs that evaluate its models."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from dschat.arguments import DataArguments
from dschat.data import splits
from dschat.data.comparisons import ComparisonIndex, Prompt, unpack_prompt, write_comparisons
from dschat.data.findings import Findings
from dschat.data.preparation import assign_parts
from dschat.data.reading import Format
from dschat.data.source_set import SourceSet
from dschat.data.sources import open_source
from dschat.errors import UserError

RECORDS = ("arguments.json", "../arguments.json")
"""Where the run that wrote a model's folder says what it was asked to do."""


@dataclass(frozen=True)
class RecordedData:
    """The data settings of a run."""

    data: DataArguments
    seed: int
    place: Path
    """The file that says so."""

    @staticmethod
    def of(model: str) -> "RecordedData | None":
        """Those of the run that wrote a model; None where nothing is recorded. Raises `UserError`."""
        for path in (Path(model) / name for name in RECORDS):
            if path.is_file():
                return _recorded(path.resolve())
        return None

    @property
    def decides(self) -> list[Any]:
        """What decides which prompts are held out."""
        data = self.data
        return [data.data_path, data.eval_data_path, data.eval_fraction, self.seed]


def _recorded(path: Path) -> RecordedData:
    known = {field.name for field in fields(DataArguments)}
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        values = {name: value for name, value in saved["data"].items() if name in known}
        return RecordedData(DataArguments(**values), int(saved["run"]["seed"]), path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not say what data its run had ({error!r}).") from error


@dataclass(frozen=True)
class SplitText:
    """N comparisons as text, and which part of the split each belongs to."""

    rows: Dataset
    """Columns as `dschat.data.comparisons.SCHEMA` has them."""
    index: ComparisonIndex
    parts: np.ndarray
    """int8 [N], as `splits.parts_of_prompts` numbers them."""
    names: tuple[str, ...]
    """The data sets' names, by their numbers in the index."""

    @staticmethod
    def of_run(recorded: RecordedData) -> "SplitText":
        """The data of a run, split as its steps do. Raises `UserError` where they cannot be read."""
        try:
            sources = SourceSet.open(recorded.data, ())
            form = replace(Format.of(recorded.data), keep_rows=True)
            rows, index = _read(sources, form)
        except UserError as error:
            raise UserError(f"the data that {recorded.place} names cannot be read: {error}") from error
        first = assign_parts(index, sources, recorded.data, recorded.seed)
        parts = splits.parts_of_prompts(index.keys, index.in_evaluation, first)
        return SplitText(rows, index, parts, tuple(source.name for source in sources.all))

    @staticmethod
    def of_entries(entries: Sequence[str], flag: str) -> "SplitText":
        """Data sets that are held out whole; of those with an evaluation split that. Raises `UserError`."""
        sources = SourceSet([], [open_source(entry, flag, evaluates=True) for entry in entries], [])
        rows, index = _read(sources, Format(keep_rows=True))
        parts = np.full(len(rows), splits.EVALUATION)
        return SplitText(rows, index, parts, tuple(source.name for source in sources.all))

    def held_out(self) -> np.ndarray:
        """The numbers of the comparisons that are held out, ascending; a prompt may have several."""
        return np.flatnonzero(self.parts == splits.EVALUATION)

    def num_trained_on(self, keys: np.ndarray) -> int:
        """How many of the prompts with these keys (`ComparisonIndex.keys`) are in a step's training share."""
        return int(np.isin(keys, self.index.keys[(self.parts >= 0) & (self.parts < splits.NUM_STEPS)]).sum())

    def prompts(self, numbers: np.ndarray) -> list[Prompt]:
        """The prompts of these comparisons."""
        return [unpack_prompt(packed) for packed in self.rows.select(numbers)["prompt"]]


def _read(sources: SourceSet, form: Format) -> tuple[Dataset, ComparisonIndex]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.arrow"
        findings = [Findings() for _ in sources.all]
        index = write_comparisons(sources.comparisons(form, findings), path)
        return Dataset.from_file(str(path), in_memory=True), index
