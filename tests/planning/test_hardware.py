"""The machines that a plan is for."""

import pytest

from dschat.errors import UserError
from dschat.planning.hardware import CUDA_CONTEXT, Hardware, bytes_of, this_hardware


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24e9), ("24GiB", 24 * 2**30), ("1.5 tb", 1.5e12), ("80g", 80e9), ("5", 5.0)]
)
def test_sizes_are_read(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "24 apples", "3ib"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="24GB"):
        bytes_of(text)


def test_a_gpu_has_less_room_than_memory_and_a_cpu_all():
    assert Hardware(device="cuda", device_memory=80e9).usable == 80e9 - CUDA_CONTEXT
    assert Hardware(device="cpu", device_memory=80e9).usable == 80e9
    assert this_hardware().host_memory > 0
