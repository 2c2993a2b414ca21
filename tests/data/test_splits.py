import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dschat.data.splits import (
    ALSO_EVALUATION,
    EVALUATION,
    REPEATED,
    assign,
    held_out_size,
    share_sizes,
    split_prompts,
)

SIZES = {"num_held_out": 100, "num_used": 900}
SHARES = st.lists(st.sampled_from([0.0, 1.0, 2.0, 2.5, 4.0, 97.0]), min_size=3, max_size=3).filter(any)


def keys_of(*numbers):
    """Keys spread over all 64 bits, as hashes are."""
    return np.array(numbers, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


@pytest.mark.parametrize(
    ("num_prompts", "shares", "sizes"),
    [
        (10, (2, 4, 4), [2, 4, 4]),
        (
            11,
            (2, 4, 4),
            [2, 5, 4],
        ),  # quotas 2.2, 4.4, 4.4: one over, the earlier of the equal remainders gets it
        (9, (2, 4, 4), [2, 4, 3]),  # 1.8, 3.6, 3.6: floors 1, 3, 3; two over go to .8 and the first .6
        (3, (98, 1, 1), [1, 1, 1]),  # 2.94, .03, .03: the large share gives one to each small one
        (2, (2, 4, 4), [0, 1, 1]),  # .4, .8, .8
        (1, (2, 4, 4), [0, 1, 0]),
        (5, (1, 0, 0), [5, 0, 0]),
        (0, (2, 4, 4), [0, 0, 0]),
    ],
)
def test_shares_are_cut_by_largest_remainder(num_prompts, shares, sizes):
    assert share_sizes(num_prompts, shares) == sizes


@pytest.mark.parametrize(
    ("num_prompts", "fraction", "size"),
    [(100, 0.05, 5), (2, 0.05, 1), (1, 0.05, 0), (0, 0.5, 0), (100, 0.0, 0), (3, 0.99, 2)],
)
def test_held_out_is_at_least_one_of_two_and_never_all(num_prompts, fraction, size):
    assert held_out_size(num_prompts, fraction) == size


@given(num_prompts=st.integers(0, 3000), shares=SHARES)
def test_share_sizes_lose_nothing_and_starve_nobody(num_prompts, shares):
    sizes = share_sizes(num_prompts, shares)
    assert sum(sizes) == num_prompts
    for size, share in zip(sizes, shares, strict=True):
        assert size == 0 if share == 0 else size >= 1 or num_prompts < sum(s > 0 for s in shares)
        assert abs(size - num_prompts * share / sum(shares)) <= 2


rows = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2), st.booleans()), max_size=120)


@settings(deadline=None)
@given(rows=rows, shares=SHARES, fraction=st.sampled_from([0.0, 0.05, 0.4]), seed=st.integers(0, 9))
def test_no_prompt_is_lost_or_in_two_parts(rows, shares, fraction, seed):
    prompts = np.array([row[0] for row in rows], dtype=np.int64)
    sources = np.array([row[1] for row in rows], dtype=np.int32)
    in_evaluation = np.array([row[2] for row in rows], dtype=bool)
    part = assign(keys_of(*prompts), sources, in_evaluation, eval_fraction=fraction, shares=shares, seed=seed)
    kept = prompts[part >= 0]
    assert sorted(kept) == sorted(set(prompts))
    assert set(prompts[in_evaluation]) <= set(prompts[part == EVALUATION])
    assert not np.any(in_evaluation & (part >= 0) & (part != EVALUATION))
    for step in range(3):
        assert shares[step] > 0 or not np.any(part == step)


def test_the_first_of_equal_prompts_is_kept():
    part = assign(
        keys_of(7, 8, 7), np.array([0, 0, 1]), np.zeros(3, bool), eval_fraction=0, shares=(1, 0, 0), seed=1
    )
    assert part.tolist() == [0, 0, REPEATED]


def test_an_evaluation_prompt_leaves_the_training_of_every_source():
    part = assign(
        keys_of(1, 2, 1, 1),
        np.array([0, 0, 1, 1]),
        np.array([False, False, True, True]),
        eval_fraction=0,
        shares=(0, 1, 0),
        seed=1,
    )
    assert part.tolist() == [ALSO_EVALUATION, 1, EVALUATION, REPEATED]


def test_only_sources_without_an_evaluation_split_give_prompts_to_evaluation():
    keys = keys_of(*range(41))
    sources = np.repeat([0, 1], [21, 20])
    in_evaluation = np.arange(41) == 20
    part = assign(keys, sources, in_evaluation, eval_fraction=0.1, shares=(2, 4, 4), seed=3)
    assert np.sum(part[:20] == EVALUATION) == 0
    assert np.sum(part[21:] == EVALUATION) == 2


def test_the_evaluation_prompts_do_not_depend_on_the_shares_or_on_the_order_of_rows():
    keys = keys_of(*range(200))
    one = split_prompts(keys, **SIZES, shares=(2, 4, 4), seed=5)
    other = split_prompts(keys, **SIZES, shares=(0, 1, 0), seed=5)
    backwards = split_prompts(keys[::-1], **SIZES, shares=(2, 4, 4), seed=5)
    assert np.array_equal(one == EVALUATION, other == EVALUATION)
    assert np.array_equal(one, backwards[::-1])


def test_another_seed_is_another_split():
    keys = keys_of(*range(200))
    one, other = (split_prompts(keys, **SIZES, shares=(2, 4, 4), seed=seed) for seed in (1, 2))
    assert not np.array_equal(one == EVALUATION, other == EVALUATION)
    assert not np.array_equal(one == 0, other == 0)


def test_the_split_of_a_known_input_never_changes():
    # Other results here would mix prompts between the steps of runs made before and after: raise FORMAT then.
    part = split_prompts(keys_of(*range(12)), num_held_out=2, num_used=10, shares=(2, 4, 4), seed=1234)
    assert part.tolist() == [2, 2, 2, 1, 1, 1, 0, 1, 2, 3, 3, 0]
