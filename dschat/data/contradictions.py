"""Contradictions: pairs of answers to one prompt of which the data say that each is the better one."""

from typing import TYPE_CHECKING

import numpy as np
import xxhash

from dschat.data.comparisons import answer_pairs

if TYPE_CHECKING:
    from datasets import Dataset

ROWS_AT_ONCE = 1000


def count_contradictions(rows: "Dataset", keys: np.ndarray) -> int:
    """Number of different pairs that the N rows hold both ways; `keys` [N] are hashes of their prompts."""
    directed: set[tuple[int, int, int]] = set()
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[start : start + ROWS_AT_ONCE]
        columns = (some["answers"], some["answer_turns"], some["ranks"])
        for key, answers, turns, ranks in zip(keys[start:], *columns, strict=False):
            whole = zip(answers, turns or answers, strict=True)
            hashes = [xxhash.xxh3_64_intdigest(repr((a.strip(), t and t.strip())).encode()) for a, t in whole]
            directed.update((int(key), *pair) for pair in answer_pairs(hashes, ranks))
    return sum(better < worse and (key, worse, better) in directed for key, better, worse in directed)
