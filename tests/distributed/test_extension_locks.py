"""Locks of extension builds: deleted where nobody holds them, waited for where somebody does."""

import os
import subprocess
import sys
import time

import pytest
from torch.utils import cpp_extension

from dschat.distributed import extension_locks

pytestmark = pytest.mark.skipif(not extension_locks.OPEN_FILES.is_dir(), reason="Linux alone tells")

BUILD = "import os, sys; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print(1, flush=True); input()"
DIES, ENDS = "", "; os.remove(sys.argv[1])"


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(extension_locks, "QUIET", 0.3)
    (tmp_path / "cpu_adam").mkdir(parents=True)
    return tmp_path / "cpu_adam" / "lock"


def building(lock, end: str) -> subprocess.Popen:
    """Another process that builds, as torch's `FileBaton` does it, until it is told to go on."""
    command = [sys.executable, "-c", BUILD + end, str(lock)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def test_a_lock_that_nobody_holds_is_deleted(lock):
    with building(lock, DIES) as other:
        other.kill()
    assert lock.exists()
    assert extension_locks.clear_build_locks(on_one_machine=True) == [lock]
    assert not lock.exists()
    assert extension_locks.clear_build_locks(on_one_machine=True) == []


@pytest.mark.slow
def test_one_that_somebody_holds_is_waited_for(lock):
    with building(lock, ENDS) as other:
        assert extension_locks.is_open(lock)
        waiter = subprocess.Popen([sys.executable, "-uc", WAIT], stdout=subprocess.PIPE, text=True)
        told = f"note: waiting for another process that compiles cpu_adam ({lock}).\n"
        assert waiter.stdout.readline() == told
        with pytest.raises(subprocess.TimeoutExpired):
            waiter.wait(timeout=2)
        other.communicate(b"go on\n")
    assert waiter.communicate(timeout=30)[0] == "[]\n"


def test_builds_of_another_python_are_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path))
    other = tmp_path / "py399_cpu" / "cpu_adam"
    other.mkdir(parents=True)
    with building(other / "lock", ENDS) as builder:
        assert extension_locks.clear_build_locks(on_one_machine=True) == []
        builder.communicate(b"go on\n")


WAIT = (
    "from dschat.distributed import extension_locks\n"
    "extension_locks.QUIET = 0.3; extension_locks.NOTE_AFTER = 0.5\n"
    "print(extension_locks.clear_build_locks(on_one_machine=True))"
)


@pytest.mark.slow
def test_another_machine_may_hold_a_young_one(lock, monkeypatch):
    lock.touch()
    monkeypatch.setattr(extension_locks, "ELSEWHERE", 2.0)
    start = time.monotonic()
    assert extension_locks.clear_build_locks(on_one_machine=False) == [lock]
    assert time.monotonic() - start > 1.5
    lock.touch()
    os.utime(lock, (1, 1))
    start = time.monotonic()
    assert extension_locks.clear_build_locks(on_one_machine=False) == [lock]
    assert time.monotonic() - start < 1.5
