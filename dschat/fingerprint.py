"""Fingerprints of content."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from dschat.errors import UserError

CHUNK = 1 << 20
"""Bytes read at once."""


def fingerprint(parts: dict[str, Any]) -> str:
    """32 hex digits that change with any value in `parts` (JSON values), not with their order."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())


def files_fingerprint(paths: Iterable[Path]) -> str:
    """32 hex digits of the files' bytes, in the order given; their names and times do not matter.

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
