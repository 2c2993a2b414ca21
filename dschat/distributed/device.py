"""This rank's device: what it can do, how full it is."""

import ctypes
import resource
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from dschat.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Precisions by their names in flags and files."""
PRECISIONS = {dtype: name for name, dtype in DTYPES.items()}
"""The names of precisions."""
KEPT_SHARE = 0.1
"""Of a GPU's memory: buffers of decoding that take more are given back between rollouts."""


def check_precision(dtype: str, offload: bool) -> None:
    """Raise `UserError` for what this machine cannot run, before anything is loaded."""
    on_cpu = get_accelerator().device_name() == "cpu"
    if dtype == "fp16" and on_cpu:
        raise UserError("--dtype fp16 needs a GPU and this machine has none; use --dtype bf16 or fp32.")
    if offload and shutil.which("g++") is None:
        raise UserError(
            "--offload compiles DeepSpeed's CPU optimiser, which needs g++; install it or leave it out."
        )
    if offload and not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise UserError(
            "--offload compiles DeepSpeed's CPU optimiser, which needs Python's headers (Python.h); install "
            "python3-dev (Fedora: python3-devel) or leave it out."
        )


def current_device() -> torch.device:
    """This rank's device, on which its collectives run."""
    return torch.device(get_accelerator().current_device_name())


def device_type() -> str:
    """Torch's type of this machine's devices, "cpu" or "cuda"; unlike `current_device` it starts none."""
    return str(get_accelerator().device_name())


def synchronize() -> None:
    """Wait for the device, so that a clock read next to it is true."""
    get_accelerator().synchronize()


def peak_memory_gib() -> float:
    """The most this rank has used so far: device memory on a GPU, resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    with suppress(OSError):  # getrusage counts what the process held that started this one
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def give_back_memory() -> None:
    """Give the system what was freed and glibc's malloc keeps: other sizes of rows hardly fit into it."""
    if device_type() == "cpu":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, whose processor time says what a way costs though others use the machine too."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
