"""Seconds by phase."""

import pytest
from plans import arguments, planned

from dschat.planning.rates import Rates

RATES = Rates(flops_per_second=1e10, bytes_per_second=1e10, overhead=0.0, seconds_per_weight=1e-9)


def test_seconds_grow_with_batches_and_answers():
    once, twice = (
        planned(arguments("sft", f"--gradient_accumulation_steps={n}"), rates=RATES).seconds for n in (1, 2)
    )
    assert once is not None
    assert twice is not None
    assert twice["forward_backward"] == 2 * once["forward_backward"]
    assert twice["optimizer"] == once["optimizer"]
    short, long = (
        planned(arguments("rlhf", f"--max_answer_seq_len={n}"), rates=RATES).seconds for n in (128, 256)
    )
    assert short is not None
    assert long is not None
    assert long["generation"] > 1.5 * short["generation"]


def test_a_pass_takes_what_its_operations_take():
    seconds = planned(arguments("sft"), rates=RATES).seconds
    fast = planned(arguments("sft"), rates=Rates(**{**vars(RATES), "flops_per_second": 1e15})).seconds
    assert seconds is not None
    assert fast is not None
    assert 0 < fast["forward_backward"] < seconds["forward_backward"]
    assert fast["optimizer"] == pytest.approx(seconds["optimizer"])
