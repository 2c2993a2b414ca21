"""Answers as text, for what scores them outside of the models, and what it says of each."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class TextAnswers:
    """Prompts, answers to them, and the columns of the data rows that they come from: lists of one length."""

    prompts: list[str]
    answers: list[str]
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.answers)

    def batches(self, size: int) -> Iterator["TextAnswers"]:
        """The same in order, so many at a time."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            columns = {name: values[part] for name, values in self.columns.items()}
            yield TextAnswers(self.prompts[part], self.answers[part], columns)


class Problem(NamedTuple):
    """Why an answer has no score."""

    kind: str
    """Problems of one kind are named once in a run."""
    text: str


Score = float | Problem
"""What a source of scores says of one answer."""
