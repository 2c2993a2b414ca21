"""What a run tells its user: on rank 0, in a line of its own also beside a progress bar."""

import os
import sys

from tqdm import tqdm


def print_rank_0(message: str) -> None:
    """Print on rank 0, on a line of its own also where a progress bar stands."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(message)
        sys.stdout.flush()
