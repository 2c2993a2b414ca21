"""Memory of freed tensors goes back to the system, also where small blocks still stand between them."""

import os
import subprocess
import sys

import pytest

from dschat.distributed.heap import give_back_large_blocks

SCRIPT = """
import ctypes, re, sys
from pathlib import Path
from dschat.distributed.heap import give_back_large_blocks
if sys.argv[1] == "set":
    assert give_back_large_blocks()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.memset.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def made(size):
    place = libc.malloc(size)
    libc.memset(place, 1, size)
    return place
def mib():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
libc.free(made(20 << 20))  # from here on glibc takes blocks of up to 20 MiB from its heap
large = [[made(8 << 20), made(200_000)][0] for _ in range(10)]
before = mib()
for place in large:
    libc.free(place)
print(round(before - mib()))
"""


def mib_given_back(how: str) -> int:
    """Of 80 MiB that were freed, with 200 kB behind each 8 that were not."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True, env=bare
    )
    return int(run.stdout)


@pytest.mark.skipif(not hasattr(os, "confstr") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""),
                    reason="the C library is not glibc")  # fmt: skip
def test_large_blocks_go_back_when_they_are_freed():
    assert mib_given_back("unset") < 20, "glibc gives them back by itself: the setting is of no use"
    assert mib_given_back("set") == 80


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_what_the_environment_says_of_the_heap_holds(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    assert not give_back_large_blocks()
