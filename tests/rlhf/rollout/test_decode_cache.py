import gc
from weakref import ref

import torch

from dschat.rlhf.rollout.decode_cache import ROUND, DecodeCache


def states(*rows: float) -> torch.Tensor:
    """Keys of one head of size 1, [B, 1, N, 1]."""
    return torch.tensor(rows)[:, None, :, None]


def test_prompts_are_kept_and_tokens_are_written_behind_them():
    cache = DecodeCache(1, 2, 3, torch.device("cpu"))
    keys, values = cache.update(states([1.0, 2.0], [3.0, 4.0]), states([5.0, 6.0], [7.0, 8.0]), 0)
    assert keys.shape[2] == values.shape[2] == 2
    cache.spread(torch.tensor([1, 0, 1]))  # two answers to the second prompt
    assert (cache.capacity, cache.width, cache.get_seq_length()) == (ROUND, ROUND, 2)
    cache.update(states([9.0], [10.0], [11.0]), states([0.0], [0.0], [0.0]), 0)
    cache.advance()
    cache.keep(torch.tensor([2, 0]))
    keys, values = cache.update(states([12.0], [13.0]), states([1.0], [2.0]), 0)
    assert keys[:, 0, :4, 0].tolist() == [[3, 4, 11, 12], [3, 4, 9, 13]]
    assert values[:, 0, :4, 0].tolist() == [[7, 8, 0, 1], [7, 8, 0, 2]]
    assert not keys[:, :, 4:].any()


def test_a_pass_reads_a_multiple_of_so_many_columns_and_its_own_among_them():
    cache = DecodeCache(1, ROUND - 1, ROUND, torch.device("cpu"))
    cache.update(torch.zeros(1, 1, ROUND - 1, 1), torch.zeros(1, 1, ROUND - 1, 1), 0)
    cache.spread(torch.tensor([0]))
    widths = []
    for _ in range(3):
        widths.append(cache.width)
        assert cache.width > cache.length
        # Products in bf16 copy what does not stand together.
        assert all(keys.shape[2] == cache.width and keys.is_contiguous() for keys in cache.states)
        cache.advance()
    assert widths == [ROUND, 2 * ROUND, 2 * ROUND]
    assert cache.capacity == 2 * ROUND


def test_what_is_to_stay_in_one_place_has_all_columns_from_the_beginning():
    placed = []

    def place(name, values):
        placed.append(name)
        return values

    cache = DecodeCache(1, ROUND - 1, ROUND, torch.device("cpu"), place)
    cache.update(torch.zeros(1, 1, ROUND - 1, 1), torch.zeros(1, 1, ROUND - 1, 1), 0)
    cache.spread(torch.tensor([0]))
    for _ in range(3):
        assert {keys.shape[2] for keys in cache.states} == {2 * ROUND}
        cache.advance()
    assert placed == ["column", "keys 0", "values 0"]


def test_keys_and_values_go_with_the_cache_and_do_not_wait_for_the_garbage_collector():
    cache = DecodeCache(1, 2, 3, torch.device("cpu"))
    cache.update(states([1.0, 2.0]), states([5.0, 6.0]), 0)
    cache.spread(torch.tensor([0, 0]))
    keys = ref(cache.states[0])
    gc.disable()
    try:
        del cache
        assert keys() is None
    finally:
        gc.enable()
