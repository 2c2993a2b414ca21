"""Comparison: the one form that every data set is brought into, and its file of text on the way to tokens."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

SCHEMA = pa.schema([("prompt", pa.string()), ("chosen", pa.string()), ("rejected", pa.string())])
ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Comparison:
    """A prompt and two answers to it, of which people preferred the first. Text, none of it empty."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class ComparisonIndex:
    """What a split needs to know of N comparisons, without their text."""

    keys: np.ndarray
    """A hash of each prompt, uint64 [N]; equal prompts have equal keys."""
    sources: np.ndarray
    """The number of the source each comes from, int32 [N]."""
    in_evaluation: np.ndarray
    """Whether its source published it for evaluation, bool [N]."""


def prompt_key(prompt: str) -> int:
    """A 64-bit hash that stands for the prompt; that two of ten million share one has a chance of 3e-6."""
    return xxhash.xxh3_64_intdigest(prompt.encode())


def write_comparisons(rows: Iterable[tuple[Comparison, int, bool]], path: Path) -> ComparisonIndex:
    """Stream (comparison, source, in evaluation) to an Arrow file of `SCHEMA`, and index them."""
    keys, sources, in_evaluation = [], [], []
    rows = iter(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        while some := list(islice(rows, ROWS_AT_ONCE)):
            comparisons = [row[0] for row in some]
            columns = [[getattr(c, name) for c in comparisons] for name in SCHEMA.names]
            writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
            keys.append(np.array([prompt_key(c.prompt) for c in comparisons], dtype=np.uint64))
            sources.append(np.array([row[1] for row in some], dtype=np.int32))
            in_evaluation.append(np.array([row[2] for row in some], dtype=bool))
    return ComparisonIndex(
        np.concatenate([np.empty(0, np.uint64), *keys]),
        np.concatenate([np.empty(0, np.int32), *sources]),
        np.concatenate([np.empty(0, bool), *in_evaluation]),
    )
