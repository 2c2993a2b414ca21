"""The C library's heap, in which tensors on a CPU stand."""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGE = 4 << 20
"""Bytes of a block that does not come from the heap but from the system, and goes back when it is freed."""
KEPT = 32 << 20
"""Free bytes at the heap's end that stay there."""


def give_back_large_blocks() -> bool:
    """Have glibc keep large blocks out of its heap, where holes between them would stay. -> whether it does.

    By itself glibc takes blocks of up to 32 MiB from the heap once one of that size was freed. Smaller ones
    than `LARGE` stay there, as fresh pages cost a tenth of a millisecond per MiB and more. What the user's
    environment says of it holds.
    """
    is_set = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    mallopt = None if is_set else getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        mallopt(*option) == 1 for option in ((M_MMAP_THRESHOLD, LARGE), (M_TRIM_THRESHOLD, KEPT))
    )
