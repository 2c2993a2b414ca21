"""That the shapes of tests/shapes.py are checked, and that none is missing."""

import inspect
import re

import pytest
import torch
from shapes import SIZES

from dschat import losses
from dschat.data.token_batch import TokenBatch
from dschat.models import forward, softmax
from dschat.rlhf.experience import AnswerAnalysis
from dschat.rlhf.rollout.batch import RolloutBatch

WIDE, NARROW = torch.zeros(2, 3), torch.zeros(2, 1)


def test_a_tensor_that_would_broadcast_is_refused():
    assert losses.masked_mean(WIDE, WIDE + 1) == 0
    with pytest.raises(TypeError, match=r"mask is torch.float32 \[2, 1\], not Shaped \*n"):
        losses.masked_mean(WIDE, NARROW + 1)
    with pytest.raises(TypeError, match="old_logprobs"):
        losses.policy_ratio(WIDE, NARROW, WIDE)


def test_batches_and_analyses_are_refused_with_rows_or_kinds_that_do_not_fit():
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(TypeError, match="label_mask"):
        TokenBatch(ids, ids, ids, 0)
    ended, rows = torch.ones(2, dtype=torch.bool), torch.arange(2)
    RolloutBatch(ids, ids, ids.bool()[:, 1:], ended, rows, 1)
    with pytest.raises(TypeError, match="prompt_rows"):
        RolloutBatch(ids, ids, ids.bool()[:, 1:], ended, rows[:1], 1)
    with pytest.raises(TypeError, match="scores"):
        AnswerAnalysis(WIDE, WIDE, WIDE, None, torch.zeros(3))


def test_a_result_is_checked_too():
    ids = torch.zeros(2, 3, dtype=torch.long)
    batch = TokenBatch(ids, ids, ids.bool(), 0)
    with pytest.raises(TypeError, match="the result"):
        forward.values_of(lambda *args, **options: torch.zeros(2, 3, 1), batch)


@pytest.mark.parametrize("module", [losses, softmax])
def test_every_public_function_of_the_mathematics_declares_all_its_tensors(module):
    for name, function in vars(module).items():
        if inspect.isfunction(function) and function.__module__ == module.__name__ and name[0] != "_":
            declared = SIZES[module.__name__][name]
            for parameter in inspect.signature(function).parameters.values():
                if str(parameter.annotation).startswith(("<class 'torch.Tensor'>", "torch.Tensor")):
                    assert parameter.name in re.split(r"[:;,]? ", declared), (name, parameter.name)
            assert "->" in declared
