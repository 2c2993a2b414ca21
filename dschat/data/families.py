"""Families of conversations, of which one goes on from another: they are held out together.

The longer conversation tells the answer to the shorter one, so a model that learned the one knows the other.
Published sets are full of them: of 2,301 prompts of HH's harmless test set 128 are the beginning of another.
"""

import json
from array import array
from collections.abc import Sequence

import numpy as np
import xxhash

ASKING = ("user", "tool")
"""The roles after which an answer follows."""


class Families:
    """The families of conversations that are added one by one."""

    def __init__(self) -> None:
        self._prefixes, self._counts = array("Q"), array("Q")

    def add(self, turns: Sequence[tuple[str, str]]) -> None:
        """Add a conversation of (role, content), which ends with a question."""
        key, num_before = 0, len(self._prefixes)
        for number, turn in enumerate(turns, start=1):
            key = xxhash.xxh3_64_intdigest(json.dumps([key, turn]).encode())
            if turn[0] in ASKING or number == len(turns):
                self._prefixes.append(key)
        self._counts.append(len(self._prefixes) - num_before)

    def keys(self) -> np.ndarray:
        """A hash for each conversation, uint64 [N]: that of the shortest of all that it begins with or is."""
        prefixes = np.array(self._prefixes, dtype=np.uint64)
        counts = np.array(self._counts, dtype=np.int64)
        whole = prefixes[np.cumsum(counts) - 1]
        places = np.flatnonzero(np.isin(prefixes, whole))
        _, shortest = np.unique(np.repeat(np.arange(len(counts)), counts)[places], return_index=True)
        return prefixes[places[shortest]]
