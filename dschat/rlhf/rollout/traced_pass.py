"""The forward pass of one token per row as TorchScript: the same operations, without Python between them.

Of a small model Python takes most of such a pass (docs/performance.md). Parameters are part of the record by
reference, so it computes with whatever weights they have; sizes of batches and widths are read anew.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dschat.rlhf.rollout.decode_cache import DecodeCache

READ_PER_CALL = ("dynamic", "longrope")
"""Kinds of rotary positions that decide in Python by the length of a row, which a record would not."""


def can_be_traced(config: Any) -> bool:
    """Whether a pass of the architecture does the same operations whatever the rows are."""
    text = config.get_text_config()
    kinds = f"{getattr(text, 'rope_parameters', None)} {getattr(text, 'rope_scaling', None)}"
    return not any(kind in kinds for kind in READ_PER_CALL)


class TracedPass:
    """`__call__` records the pass when it is first made, and from then on repeats it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._recorded: Callable[..., Tensor] | None = None

    def __call__(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DecodeCache) -> Tensor:
        """The logits that follow one token per row: [B, 1], mask [B, 1, 1, W], [B, 1] -> [B, V]."""
        inputs = (ids, mask, positions, cache.column, *cache.states)
        if self._recorded is None:
            with _without_gradients(self._model), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of sizes that become numbers; the trial sees what matters
                self._recorded = torch.jit.trace(self._pass, inputs, check_trace=False)
        return self._recorded(*inputs)

    def _pass(self, ids: Tensor, mask: Tensor, positions: Tensor, column: Tensor, *states: Tensor) -> Tensor:
        cache = DecodeCache.of_states(column, states, width=mask.shape[-1])
        output = self._model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return output.logits[:, -1]


@contextlib.contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """A record takes tensors that want no gradient only."""
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)
