import math

import pytest
import torch

from dschat.errors import UserError
from dschat.rlhf.rollout.agreement import Difference, RolloutCheck
from dschat.rlhf.rollout.batch import RolloutBatch

TRAINED = torch.tensor([[-1.0, -2.0], [-3.0, math.nan]])


def sampled(*logprobs: float) -> RolloutBatch:
    """An answer of two tokens and one of one, sampled with these log-probabilities."""
    mask = torch.tensor([[True, True], [True, False]])
    first, second, third = logprobs
    return RolloutBatch(
        input_ids=torch.zeros(2, 3, dtype=torch.long),
        attention_mask=torch.cat([torch.ones(2, 1), mask], dim=1).long(),
        answer_mask=mask,
        ended=torch.tensor([False, True]),
        prompt_rows=torch.arange(2),
        prompt_length=1,
        logprobs=torch.tensor([[first, second], [third, 0.0]]),
    )


APART = sampled(-1.1, -1.9, -3.4)  # by 0.1, 0.1 and 0.4: mean 0.2


def test_the_difference_is_over_valid_tokens_and_without_sign():
    difference = Difference.between(APART, TRAINED)
    assert difference.mean == pytest.approx(0.2)
    assert difference.largest == pytest.approx(0.4)
    assert difference.num_tokens == 3


@pytest.mark.parametrize("on_mismatch", ["stop", "uncached", "warn"])
def test_within_the_tolerance_one_line_is_printed_and_the_run_goes_on(on_mismatch, capsys):
    assert not RolloutCheck(0.21, on_mismatch).wants_uncached(APART, TRAINED)
    assert capsys.readouterr().out == (
        "rollout check: generate() against the training model over 3 tokens: log-probabilities differ by "
        "mean 0.2, at most 0.4 (tolerance of the mean 0.21)\n"
    )


def test_beyond_the_tolerance_the_run_stops():
    with pytest.raises(UserError, match=r"mean 0.2, at most 0.4, and --rollout_tolerance .* 0.19 pass"):
        RolloutCheck(0.19, "stop").wants_uncached(APART, TRAINED)


@pytest.mark.parametrize(("on_mismatch", "again"), [("uncached", True), ("warn", False)])
def test_beyond_the_tolerance_what_happens_instead_is_said(on_mismatch, again, capsys):
    assert RolloutCheck(0.19, on_mismatch).wants_uncached(APART, TRAINED) == again
    told = capsys.readouterr().out
    assert "warning: generate() and the training model disagree" in told
    assert f"--rollout_on_mismatch {on_mismatch}: " in told


def test_what_is_no_number_passes_no_tolerance():
    with pytest.raises(UserError, match="mean nan"):
        RolloutCheck(100, "stop").wants_uncached(sampled(-1, math.nan, -3), TRAINED)


def test_answers_without_a_cache_must_agree(capsys):
    check = RolloutCheck(0.19, "uncached")
    check.require_agreement(sampled(-1, -2, -3.1), TRAINED)
    assert "generate() without a KV cache against the training model" in capsys.readouterr().out
    with pytest.raises(UserError, match="The KV cache is not to blame"):
        check.require_agreement(APART, TRAINED)
