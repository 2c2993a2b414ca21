"""Where what can be made again is kept."""

import os
from pathlib import Path


def user_cache() -> Path:
    """The folder of this machine's user for all programs: `XDG_CACHE_HOME`, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
