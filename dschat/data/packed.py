"""Files packed with gzip, bzip2, xz or Zstandard, opened as the bytes that were packed."""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa


def _zstd(path: Path) -> BinaryIO:
    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))


PACKED: dict[str, tuple[str, Callable[[Path], Any], bytes]] = {
    ".gz": ("gzip", gzip.open, b"\x1f\x8b"),
    ".bz2": ("bzip2", bz2.open, b"BZh"),
    ".xz": ("xz", lzma.open, b"\xfd7zXZ\0"),
    ".zst": ("Zstandard", _zstd, b"\x28\xb5\x2f\xfd"),
}
"""By suffix: the name of the program, what opens the file, and the bytes it begins with."""


def packing(name: str) -> str:
    """The suffix of a packed file, "" for another."""
    return next((suffix for suffix in PACKED if name.lower().endswith(suffix)), "")


def open_unpacked(path: Path, suffix: str) -> BinaryIO:
    """Open a file for reading, unpacked as `suffix` says; "" is a file that is not packed."""
    file: BinaryIO = PACKED[suffix][1](path) if suffix else path.open("rb")
    return file
