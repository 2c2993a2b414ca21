"""Keys and values of a batch of answers, in buffers whose length is known before the first token."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import proxy

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

ROUND = 32
"""A forward pass reads a multiple of so many columns: the shapes of decoding are few, and divisible."""


class DecodeLayer(CacheLayerMixin):
    """Those of one layer: [B, heads, columns, head size]."""

    is_sliding = False

    def __init__(self, cache: "DecodeCache", number: int) -> None:
        super().__init__()
        self._number = number
        self._cache = proxy(cache)  # in a circle keys and values would stay until Python looks for circles

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The prompts' are kept as they come."""
        self.keys, self.values = key_states, value_states
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep the prompts', then those of one token at a time; returns all that may be read."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        keys, values = self.pair
        if self._cache.store is None:
            keys.index_copy_(2, self._cache.column, key_states)
            values.index_copy_(2, self._cache.column, value_states)
        else:
            self._cache.store(keys, values, self._cache.column, key_states, value_states)
        width = self._cache.width
        return keys[:, :, :width], values[:, :, :width]

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """Keys and values, which a first pass has made."""
        assert self.keys is not None, "a pass has been made"
        assert self.values is not None, "a pass has been made"
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many columns a pass reads, and the first of them."""
        return (self._cache.width if self.is_initialized else query_length), 0

    def get_seq_length(self) -> int:
        """Columns that are written."""
        return self._cache.length if self.is_initialized else 0

    def get_max_length(self) -> int:
        """Columns that there are."""
        return self._cache.capacity

    def spread(self, rows: Tensor) -> None:
        """Make room for the answers: row i of the batch begins with what is in row `rows[i]` now."""
        self._put(self._spread(states, rows) for states in self.pair)

    def keep(self, rows: Tensor) -> None:
        """Only these rows, in this order."""
        self._put(states[rows] for states in self.pair)

    def _put(self, pair: Iterable[Tensor]) -> None:
        names = (f"keys {self._number}", f"values {self._number}")
        self.keys, self.values = map(self._cache.place, names, pair)

    def grow(self) -> None:
        """Room for the columns that the next pass reads, and no more."""
        self._put(F.pad(states, (0, 0, 0, self._cache.width - states.shape[2])) for states in self.pair)

    def _spread(self, states: Tensor, rows: Tensor) -> Tensor:
        columns = self._cache.width if self._cache.grows else self._cache.capacity
        return F.pad(states[rows], (0, 0, 0, columns - states.shape[2]))


class DecodeCache(Cache):
    """The keys and values of prompts of P columns, and after them of their answers' tokens, one at a time.

    A token's are written to the column `column`, and a pass reads the first `width` columns, in which a mask
    hides what is not written yet. There are no more columns than that, as products in bf16 on a CPU would
    copy a part of them; but all from the beginning where they are to stay in one place.
    """

    def __init__(
        self,
        num_layers: int,
        prompt_length: int,
        answer_length: int,
        device: torch.device,
        place: Callable[[str, Tensor], Tensor] | None = None,
    ) -> None:
        """`place` is given what decoding reads and writes, by a name, and returns it where it is to stay."""
        self.grows = place is None
        self.place = place or (lambda name, values: values)
        self.store: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None] | None = None
        """What writes a token's keys and values to a column, in place of torch."""
        self.capacity = _rounded(prompt_length + answer_length)
        self.length = prompt_length
        """Columns that are written, but for the pass in progress."""
        self.width = prompt_length
        self.column = self.place("column", torch.tensor([prompt_length], device=device))
        """[1]: where the next token's keys and values go; a tensor, for passes that are recorded."""
        self._own = [DecodeLayer(self, number) for number in range(num_layers)]
        super().__init__(layers=[*self._own])

    @staticmethod
    def of_states(
        column: Tensor, states: Sequence[Tensor], *, width: int, store: Callable[..., None] | None = None
    ) -> "DecodeCache":
        """One in the middle of answers, of the keys and the values of each layer in turn."""
        cache = DecodeCache(len(states) // 2, 1, 1, column.device)
        cache.column, cache.width, cache.store = column, width, store
        for layer, keys, values in zip(cache._own, states[::2], states[1::2], strict=True):
            layer.lazy_initialization(keys, values)
        return cache

    @property
    def states(self) -> list[Tensor]:
        """The keys and the values of each layer in turn."""
        return [states for layer in self._own for states in layer.pair]

    def spread(self, rows: Tensor) -> None:
        """After the pass of the prompts: one row for each answer, that of its prompt."""
        self._widen()
        for layer in self._own:
            layer.spread(rows)

    def advance(self) -> None:
        """To the next column."""
        self.length += 1
        self.column.add_(1)
        if self._widen() and self.grows:
            for layer in self._own:
                layer.grow()

    def keep(self, rows: Tensor) -> None:
        """Only these rows, in this order."""
        for layer in self._own:
            layer.keep(rows)

    def _widen(self) -> bool:
        """Have the next pass read the next token's column too. -> whether it reads more than the last one."""
        before, self.width = self.width, min(_rounded(self.length + 1), self.capacity)
        return self.width > before


def _rounded(length: int) -> int:
    return -(-length // ROUND) * ROUND
