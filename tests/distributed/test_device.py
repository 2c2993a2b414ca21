"""The checks of a machine before anything is loaded."""

import os
import shutil
import sysconfig

import psutil
import pytest
import torch

from dschat.distributed import device
from dschat.errors import UserError


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works on a GPU")
def test_fp16_on_a_cpu_says_what_to_use():
    with pytest.raises(UserError, match=r"--dtype fp16 .* --dtype bf16 or fp32"):
        device.check_precision("fp16", offload=False)


def test_offload_without_a_compiler_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(UserError, match=r"--offload .* g\+\+"):
        device.check_precision("bf16", offload=True)


def test_offload_without_the_headers_of_python_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", str)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    with pytest.raises(UserError, match=r"--offload .*Python\.h.* install python3-dev"):
        device.check_precision("bf16", offload=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the device's memory there")
def test_on_a_cpu_the_peak_is_that_of_the_whole_process():
    held = torch.ones(2**26, dtype=torch.uint8)
    now = psutil.Process().memory_info().rss / 2**30
    assert held.sum() == 2**26
    assert now <= device.peak_memory_gib() * 1.01
    assert device.peak_memory_gib() > 1 / 16
    assert device.current_device() == torch.device("cpu")
    assert device.device_type() == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="only the memory of a CPU is malloc's")
def test_what_was_freed_goes_back_to_the_system():
    blocks = [torch.ones(4096) for _ in range(6000)]  # 96 MB in blocks that malloc does not map by themselves
    last = blocks[-1]  # lies above the others, so that freeing them leaves the heap as long
    blocks.clear()
    before = psutil.Process().memory_info().rss
    device.give_back_memory()
    assert psutil.Process().memory_info().rss < before - 50e6
    assert last.sum() == 4096
