import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dschat.data.splits import (
    ALSO_EVALUATION,
    EVALUATION,
    OUTWEIGHED,
    REPEATED,
    assign,
    blend_sizes,
    held_out_size,
    number_among_equals,
    parts_of_prompts,
    share_sizes,
    some_rows,
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
    one = split_prompts(keys, keys, **SIZES, shares=(2, 4, 4), seed=5)
    other = split_prompts(keys, keys, **SIZES, shares=(0, 1, 0), seed=5)
    backwards = split_prompts(keys[::-1], keys[::-1], **SIZES, shares=(2, 4, 4), seed=5)
    assert np.array_equal(one == EVALUATION, other == EVALUATION)
    assert np.array_equal(one, backwards[::-1])


def test_another_seed_is_another_split():
    keys = keys_of(*range(200))
    one, other = (split_prompts(keys, keys, **SIZES, shares=(2, 4, 4), seed=seed) for seed in (1, 2))
    assert not np.array_equal(one == EVALUATION, other == EVALUATION)
    assert not np.array_equal(one == 0, other == 0)


def test_the_split_of_a_known_input_never_changes():
    # Other results here would mix prompts between the steps of runs made before and after: raise FORMAT then.
    keys = keys_of(*range(12))
    part = split_prompts(keys, keys, num_held_out=2, num_used=10, shares=(2, 4, 4), seed=1234)
    assert part.tolist() == [2, 2, 2, 1, 1, 1, 0, 1, 2, 3, 3, 0]


@pytest.mark.parametrize(
    ("sizes", "weights", "used"),
    [
        ({0: 100, 1: 50}, {}, {0: 100, 1: 50}),
        ({0: 100}, {0: 0.3}, {0: 100}),  # one source is in proportion to itself whatever its weight
        ({0: 100, 1: 100}, {0: 0.3}, {0: 30, 1: 100}),  # 0.3 to 1
        ({0: 15, 1: 100}, {0: 0.3}, {0: 15, 1: 50}),  # the first runs out at 15, that is 50 of the other
        ({0: 100, 1: 100, 2: 100}, {0: 2, 1: 4, 2: 1}, {0: 50, 1: 100, 2: 25}),
        ({0: 7, 1: 7, 2: 7}, {0: 3, 1: 2, 2: 2}, {0: 7, 1: 5, 2: 5}),  # 7, 4.67, 4.67
        ({0: 1, 1: 1000}, {0: 1.0, 1: 0.001}, {0: 1, 1: 1}),  # never none
        ({0: 3, 1: 8}, {5: 0.2}, {0: 3, 1: 3}),  # equal parts, as neither has a weight of its own
        ({}, {0: 1.0}, {}),
    ],
)
def test_a_blend_uses_as_many_prompts_as_the_scarce_source_allows(sizes, weights, used):
    assert blend_sizes(sizes, weights) == used


BLEND = {"eval_fraction": 0.1, "shares": (2, 4, 4), "seed": 3}


def blended(weights, fraction=0.1):
    keys, sources = keys_of(*range(300)), np.repeat([0, 1], [100, 200])
    settings = {**BLEND, "eval_fraction": fraction}
    return sources, assign(keys, sources, np.zeros(300, bool), weights=weights, **settings)


def test_every_step_holds_the_sources_in_proportion_to_their_weights():
    # 90 and 180 prompts are for training; 1 to 0.5 uses 90 of the one and 45 of the other.
    sources, part = blended({1: 0.5})
    assert [int(np.sum(part[sources == 0] == step)) for step in range(3)] == [18, 36, 36]
    assert [int(np.sum(part[sources == 1] == step)) for step in range(3)] == [9, 18, 18]
    assert np.sum(part == OUTWEIGHED) == 180 - 45


def test_weights_leave_evaluation_alone_and_move_no_prompt_to_another_step_than_its_order_asks():
    _, without = blended(None)
    _, light = blended({1: 0.5})
    _, lighter = blended({1: 0.25})
    for part in (light, lighter):
        assert np.array_equal(part == EVALUATION, without == EVALUATION)
    used, fewer = light != OUTWEIGHED, lighter != OUTWEIGHED
    assert np.all(used[fewer])  # what a lighter weight uses, a heavier one does, too


def test_a_blend_counts_only_the_prompts_that_are_a_sources_own():
    # Source 1 repeats all but ten of source 0's prompts, so with equal weights each gives ten.
    keys, sources = keys_of(*range(40), *range(30), *range(40, 50)), np.repeat([0, 1], 40)
    part = assign(
        keys, sources, np.zeros(80, bool), eval_fraction=0, shares=(1, 0, 0), seed=1, weights={1: 1.0}
    )
    assert [int(np.sum(part[sources == n] == 0)) for n in (0, 1)] == [10, 10]
    assert np.all(parts_of_prompts(keys, np.zeros(80, bool), part)[40:70] == part[:30])


@given(
    sizes=st.dictionaries(st.integers(0, 4), st.integers(1, 500), min_size=1),
    weights=st.dictionaries(st.integers(0, 4), st.floats(0.01, 10), min_size=1),
)
def test_a_blend_is_in_proportion_and_uses_a_source_up(sizes, weights):
    used = blend_sizes(sizes, weights)
    assert all(1 <= used[n] <= sizes[n] for n in sizes)
    assert any(used[n] == sizes[n] for n in sizes)
    scarce = min(sizes, key=lambda n: sizes[n] / weights.get(n, 1.0))
    for n in sizes:
        wanted = sizes[scarce] / weights.get(scarce, 1.0) * weights.get(n, 1.0)
        assert abs(used[n] - wanted) <= 0.5 + 1e-6 or used[n] == 1


@given(count=st.integers(0, 40), more=st.integers(0, 40), seed=st.integers(0, 5))
def test_fewer_samples_are_among_more_and_the_same_again(count, more, seed):
    keys = keys_of(*range(30))
    some, others = some_rows(keys, count, seed), some_rows(keys, count + more, seed)
    assert len(some) == min(count, 30)
    assert set(some) <= set(others)
    assert list(some) == sorted(set(some))
    backwards = 29 - some_rows(keys[::-1], count, seed)
    assert sorted(backwards) == list(some)


@pytest.mark.slow
@given(rows=rows, weights=st.dictionaries(st.integers(0, 2), st.floats(0.1, 3)), seed=st.integers(0, 9))
def test_rows_of_one_prompt_are_of_one_part(rows, weights, seed):
    prompts = np.array([row[0] for row in rows], dtype=np.int64)
    sources = np.array([row[1] for row in rows], dtype=np.int32)
    in_evaluation = np.array([row[2] for row in rows], dtype=bool)
    part = assign(
        keys_of(*prompts),
        sources,
        in_evaluation,
        eval_fraction=0.2,
        shares=(2, 4, 4),
        seed=seed,
        weights=weights,
    )
    whole = parts_of_prompts(keys_of(*prompts), in_evaluation, part)
    for prompt in set(prompts.tolist()):
        mine = prompts == prompt
        assert len(set(whole[mine & ~in_evaluation].tolist())) <= 1
        assert set(whole[mine & in_evaluation].tolist()) <= {EVALUATION}
        if np.any(mine & in_evaluation):
            assert set(whole[mine & ~in_evaluation].tolist()) <= {ALSO_EVALUATION}


@pytest.mark.parametrize(
    ("keys", "numbers"), [([], []), ([5], [0]), ([5, 3, 5, 5, 3, 9], [0, 0, 1, 2, 1, 0])]
)
def test_equal_keys_are_counted_on_in_their_order(keys, numbers):
    assert number_among_equals(np.array(keys, dtype=np.uint64)).tolist() == numbers


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_families_are_held_out_whole_and_the_numbers_stay(size):
    families = np.arange(200) // size
    families[150:] = np.arange(150, 200)  # some prompts have no relatives
    part = split_prompts(
        keys_of(*range(200)), families, **{**SIZES, "num_held_out": 20}, shares=(1, 1, 1), seed=5
    )
    held_out = part == EVALUATION
    assert held_out.sum() == 20
    assert not set(families[held_out]) & set(families[~held_out])
    backwards = slice(None, None, -1)
    settings = {**SIZES, "num_held_out": 20, "shares": (1, 1, 1), "seed": 5}
    again = split_prompts(keys_of(*range(200))[backwards], families[backwards] + 1000, **settings)
    assert np.array_equal(again[backwards], part)  # neither order nor numbers of families matter


def test_one_family_of_all_prompts_is_held_out_by_prompts():
    keys = keys_of(*range(20))
    one, none = (
        split_prompts(keys, families, num_held_out=3, num_used=17, shares=(1, 0, 0), seed=5)
        for families in (np.zeros(20), keys)
    )
    assert np.array_equal(one, none)
    assert np.sum(one == EVALUATION) == 3
