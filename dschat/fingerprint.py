"""Fingerprints of content: of JSON values, and of files."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from dschat.errors import UserError

CHUNK = 1 << 20
"""Bytes read at once."""


def fingerprint(parts: dict[str, Any]) -> str:
    """The fingerprint of a dictionary of JSON values, 32 hex digits, independent of the order of its keys."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())


def files_fingerprint(paths: Iterable[Path]) -> str:
    """The fingerprint of the bytes of files in the order given, 32 hex digits. Names and times do not count.

    Raises `UserError` for a file that cannot be read.
    """
    whole = xxhash.xxh3_128()
    for path in paths:
        one = xxhash.xxh3_128()
        try:
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    one.update(chunk)
        except OSError as error:
            raise UserError(
                f"{path}: it cannot be read ({error.strerror or error}); correct the path or its permissions."
            ) from error
        whole.update(one.digest())
    return whole.hexdigest()
