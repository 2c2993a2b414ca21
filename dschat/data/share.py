"""Choice of the comparisons that a step takes of its prompts and of those held out."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dschat.data import splits
from dschat.data.comparisons import ComparisonIndex
from dschat.data.tokenization import Tokenized


@dataclass(frozen=True)
class Task:
    """One step's requirements for its comparisons."""

    step: int
    """1, 2 or 3."""
    tokenize: Callable[..., Tokenized]
    limit: str
    """The flag that bounds a prompt's length."""
    max_tokens: int
    """The value of that flag, in tokens."""
    settings: dict[str, Any]
    """Settings that shape the tokens beside the text and the tokenizer, for the cache's key."""
    keep_rows: bool = False
    """Whether the data rows stand beside the tokens."""
    lacks: str = ""
    """Reason under which prompts are counted that the step cannot use."""
    unique_prompts: bool = False
    """Whether steps 1 and 3 take a prompt once."""

    def can_use(self, index: ComparisonIndex) -> np.ndarray:
        """Which comparisons the step can use, bool [N]: those with an answer, with a pair, or all."""
        return {1: index.num_answers > 0, 2: index.num_pairs > 0}.get(self.step, index.num_answers >= 0)

    def identities(self, index: ComparisonIndex, *, training: bool) -> np.ndarray:
        """A number for each comparison, [N]; of those with the same number the step takes the first.

        Step 1 learns every different answer, step 2 compares every different row, and step 3 meets a prompt
        as often as it stands in the data but is evaluated on it once.
        """
        if self.step == 2:
            return index.row_keys
        if self.unique_prompts or (self.step == 3 and not training):
            return index.keys
        return index.example_keys if self.step == 1 else np.arange(len(index.keys))

    @property
    def what_repeats(self) -> str:
        """Reason under which the comparisons of `repeats` are counted."""
        if self.unique_prompts and self.step != 2:
            return "repeated prompt"
        return "prompt repeated in evaluation" if self.step == 3 else "repeated row"

    def repeats(self, index: ComparisonIndex, parts: np.ndarray) -> np.ndarray:
        """Which comparisons of any part are dropped because one of their identity comes before, bool [N]."""
        repeats = parts >= 0
        for training in (True, False):
            rows = np.flatnonzero((parts >= 0) & ((parts != splits.EVALUATION) == training))
            repeats[splits.first_of_each(self.identities(index, training=training), rows)] = False
        return repeats


def rows_of_part(
    part: int, index: ComparisonIndex, parts: np.ndarray, task: Task
) -> tuple[np.ndarray, Counter[str]]:
    """The comparisons that the step takes of a part, ascending, and why prompts of it are left out.

    `parts` are those of the prompts, as `splits.parts_of_prompts` gives them.
    """
    mine = parts == part
    usable = mine & task.can_use(index)
    num_unusable = len(np.setdiff1d(index.keys[mine], index.keys[usable]))
    identities = task.identities(index, training=part != splits.EVALUATION)
    return splits.first_of_each(identities, np.flatnonzero(usable)), Counter({task.lacks: num_unusable})


def some_of(rows: np.ndarray, index: ComparisonIndex, count: int, seed: int) -> np.ndarray:
    """At most `count` of the comparisons `rows`, ascending; a larger count adds to them."""
    # Equal rows lie together in an order by hashes; their number among equals moves them apart.
    apart = splits.number_among_equals(index.row_keys[rows]).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return rows[splits.some_rows(index.row_keys[rows] ^ apart, count, seed)]
