"""Answers as text, for sources of scores outside of the models, and the score or problem of each."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class TextAnswers:
    """Prompts, answers, and the columns of the data that the prompts come from: lists of one length."""

    prompts: list[str]
    answers: list[str]
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.answers)

    def batches(self, size: int) -> Iterator["TextAnswers"]:
        """Consecutive parts of at most `size` answers."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            columns = {name: values[part] for name, values in self.columns.items()}
            yield TextAnswers(self.prompts[part], self.answers[part], columns)


class Problem(NamedTuple):
    """Why an answer has no score."""

    kind: str
    """Problems of one kind are reported once in a run."""
    text: str


Score = float | Problem
"""An answer's score, or why it has none."""
