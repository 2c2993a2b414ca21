"""Gathering of parameters; under ZeRO-3 itself tests/models/test_loading.py and others do it on two ranks."""

import torch

from dschat.distributed.deepspeed_private import is_sharded
from dschat.distributed.zero3 import gathered


def test_parameters_that_are_whole_stay_as_they_are():
    weight = torch.nn.Parameter(torch.ones(2))
    assert not is_sharded(weight)
    with gathered([weight], modifier_rank=0), torch.no_grad():
        weight[0] = 3
    assert weight.tolist() == [3, 1]
