"""A torchrun that hangs ends after its rank, one that may start its ranks again does not."""

import signal
import subprocess
import sys

import pytest
from processes import environment

RANK = """
from dschat.distributed import launcher
launcher.GRACE = 0.5
print(launcher.end_torchrun())
"""
TORCHRUN = f"""
import subprocess, sys, time
subprocess.run([sys.executable, "-c", {RANK!r}])
time.sleep(float(sys.argv[1]))
"""


def run(seconds: float, *, count: int, most: int) -> subprocess.CompletedProcess:
    """A launcher that hangs for some time after its rank has ended."""
    attempts = {"TORCHELASTIC_RESTART_COUNT": str(count), "TORCHELASTIC_MAX_RESTARTS": str(most)}
    command = [sys.executable, "-c", TORCHRUN, str(seconds)]
    return subprocess.run(command, env=environment(**attempts), capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(sys.platform != "linux", reason="pidfd_open is Linux's")
@pytest.mark.parametrize(
    ("seconds", "count", "most", "ends", "asked"),
    [(50, 2, 2, -signal.SIGKILL, "True"), (0, 0, 0, 0, "True"), (1.5, 1, 2, 0, "False")],
    ids=["hangs", "ends by itself", "may start again"],
)
def test_torchrun_is_killed_where_it_hangs_and_has_no_attempt_left(seconds, count, most, ends, asked):
    ended = run(seconds, count=count, most=most)
    assert (ended.returncode, ended.stdout.strip()) == (ends, asked), ended.stderr
