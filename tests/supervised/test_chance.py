"""A reward model that learns nothing is named once, with the usual causes; one that learns is not."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from dschat.data.rows import Rows
from dschat.supervised.chance import NUM_STEPS, ChanceWatch


def watch(*, limit: int = 64, is_on: bool = True) -> ChanceWatch:
    """Of four pairs of 6 and 3 tokens (the chosen one is the longer one in three of them)."""
    ids = {"chosen_ids": [[1] * 6, [1] * 6, [1] * 6, [1] * 3], "rejected_ids": [[1] * 3] * 3 + [[1] * 6]}
    settings = SimpleNamespace(
        batch=SimpleNamespace(max_seq_len=limit), model=SimpleNamespace(learning_rate=1e-9)
    )
    return ChanceWatch(settings, SimpleNamespace(train=Rows.from_dict(ids)), is_on=is_on)


def steps(share_right: float, *, pairs: int = 8, number: int = NUM_STEPS, loss: float = math.log(2)) -> list:
    """Optimiser steps whose pairs are right by chance, so often in the mean."""
    right = np.random.default_rng(0).binomial(pairs, share_right, number) / pairs
    return [{"accuracy": float(accuracy), "loss": loss} for accuracy in right]


def warnings_of(watch: ChanceWatch, metrics: list, capsys, *, first: int = 1) -> str:
    for step, values in enumerate(metrics, first):
        watch.take_in(step, values)
    return capsys.readouterr().out


@pytest.mark.parametrize("pairs", [8, 64])
def test_random_labels_are_told_of_after_200_steps_and_once(pairs, capsys):
    at_chance = watch()
    assert warnings_of(at_chance, steps(0.5, pairs=pairs, number=NUM_STEPS - 1), capsys) == ""
    said = warnings_of(at_chance, steps(0.5, pairs=pairs, number=1), capsys, first=NUM_STEPS)
    assert said.startswith("WARNING: step 200: the reward model ranks its training pairs as chance does")
    assert warnings_of(at_chance, steps(0.5, pairs=pairs, number=3 * NUM_STEPS), capsys) == ""


@pytest.mark.parametrize(("share_right", "pairs"), [(0.55, 16), (0.6, 4), (0.65, 1), (1.0, 8), (0.3, 8)])
def test_it_is_silent_where_something_is_learned_or_the_labels_are_the_wrong_way_round(
    share_right, pairs, capsys
):
    said = warnings_of(watch(), steps(share_right, pairs=pairs, number=3 * NUM_STEPS), capsys)
    assert (said == "") == (share_right > 0.5)


def test_with_few_pairs_a_step_more_steps_are_taken_in_until_they_tell(capsys):
    said = warnings_of(watch(), steps(0.5, pairs=1, number=5 * NUM_STEPS), capsys)
    assert "over the last 400 optimiser steps" in said


def test_it_is_silent_in_other_steps(capsys):
    assert warnings_of(watch(is_on=False), steps(0.5), capsys) == ""


def test_the_likeliest_cause_comes_first_with_the_numbers_of_the_run(capsys):
    flat = warnings_of(watch(), steps(0.5), capsys)
    assert (
        "What usually is the cause: a learning rate too low for the new head: --learning_rate 1e-09" in flat
    )
    assert "the chosen one is the longer one in 75% of the pairs" in flat
    noisy = warnings_of(watch(), steps(0.5, loss=0.8), capsys)
    assert "What usually is the cause: labels that are noise" in noisy
    cut = warnings_of(watch(limit=6), steps(0.5), capsys)
    assert "cause: answers that --max_seq_len 6 cuts: 100% of the training pairs reach it" in cut


def test_a_resumed_run_goes_on_counting(capsys):
    first, second = watch(), watch()
    warnings_of(first, steps(0.5, number=150), capsys)
    second.load_state_dict(first.state_dict())
    assert "step 200" in warnings_of(second, steps(0.5, number=50), capsys, first=151)
    third = watch()
    third.load_state_dict(second.state_dict())
    assert warnings_of(third, steps(0.5), capsys) == ""
