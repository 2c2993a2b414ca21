"""The program that started this rank, torchrun or the deepspeed launcher: one ends with the other."""

import ctypes
import os
import signal
import subprocess
import sys

VARIABLES = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")
"""What torchrun and the deepspeed launcher set for a rank."""

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that a process gets when its parent ends."""

GRACE = 15.0
"""Seconds that torchrun has to end by itself."""

ENDER = """
import select, signal, sys
torchrun = int(sys.argv[1])
if not select.select([torchrun], [], [], float(sys.argv[2]))[0]:
    signal.pidfd_send_signal(torchrun, signal.SIGKILL)
"""
"""A program of its own, because torchrun may hang before it takes note that this process has ended."""


def is_launched() -> bool:
    """Whether a launcher started this process."""
    return any(name in os.environ for name in VARIABLES)


def end_with_launcher() -> None:
    """Ask for a SIGTERM when torchrun or the deepspeed launcher, which started this rank, is killed.

    Nobody would look after the ranks then, and a new run could meet them in the same folder. In training it
    is a request like any other: they save and end. Linux alone can; elsewhere nothing happens.
    """
    if is_launched() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def end_torchrun() -> bool:
    """Have torchrun end soon after this rank, which ends because another host is lost. False: it may go on.

    Where its store is on that host, `TCPStore.get` sends its time-out to the store and waits for the answer
    without one, deaf to a SIGTERM, until TCP gives up after a quarter of an hour. A torchrun that may start
    its ranks again is left alone: the link may come back.
    """
    attempts = [os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RESTART_COUNT", "MAX_RESTARTS")]
    if sys.platform != "linux" or not all(attempts) or int(attempts[0]) < int(attempts[1]):
        return False
    torchrun = os.pidfd_open(os.getppid())
    subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", ENDER, str(torchrun), str(GRACE)],
        pass_fds=[torchrun], start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return True
