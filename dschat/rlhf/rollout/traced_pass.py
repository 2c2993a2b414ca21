"""The forward pass of one token per row as TorchScript: the same operations, without Python between them.

Of a small model Python takes most of such a pass (docs/performance.md). Parameters are inputs of the record:
it would keep what it computes of constants, such as Gemma's 1 + weight, and go on with weights of the past.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dschat.rlhf.rollout.decode_cache import DecodeCache
from dschat.rlhf.rollout.keyed_sampling import TokenDraw

READ_PER_CALL = ("dynamic", "longrope")
"""Kinds of rotary positions that decide in Python by the length of a row, which a record would not."""


def can_be_traced(config: Any) -> bool:
    """Whether a pass of the architecture does the same operations whatever the rows are."""
    text = config.get_text_config()
    kinds = f"{getattr(text, 'rope_parameters', None)} {getattr(text, 'rope_scaling', None)}"
    return not any(kind in kinds for kind in READ_PER_CALL)


class TracedPass:
    """`__call__` records the pass when it is first made, and from then on repeats it."""

    def __init__(self, model: nn.Module, *, in_fp32: bool = False) -> None:
        """With `in_fp32` a model in bf16 computes in fp32, with copies of its weights."""
        self._model, self._in_fp32 = model, in_fp32
        self._parameters = list(model.parameters())
        self._weights: list[Tensor] = []
        self._recorded: Callable[..., Tensor] | None = None

    def begin(self) -> None:
        """Before a batch: take the parameters, or copies of them in fp32, to compute its answers with."""
        self._weights = []  # the last batch's copies go before there are others
        self._weights = [p.detach().float() if self._in_fp32 else p for p in self._parameters]

    def end(self) -> None:
        """After a rollout: give the copies back."""
        self._weights = []

    def place(self, name: str, values: Tensor) -> Tensor:
        """The values, as a record takes them from wherever they are."""
        return values

    def weights_in_place(self) -> contextlib.AbstractContextManager[None]:
        """Copies in fp32, if there are any, in the place of the parameters."""
        return self._replaced(self._weights) if self._in_fp32 else contextlib.nullcontext()

    def draw(self, draw: TokenDraw, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `draw` returns for logits [B, V] and uniforms [B]."""
        return draw(logits, uniforms)

    def __call__(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DecodeCache) -> Tensor:
        """The logits that follow one token per row: [B, 1], mask [B, 1, 1, W], [B, 1] -> [B, V]."""
        inputs = (ids, mask, positions, cache.column, *cache.states, *self._weights)
        if self._recorded is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of sizes that become numbers; the trial sees what matters
                self._recorded = torch.jit.trace(self._pass, inputs, check_trace=False)
        return self._recorded(*inputs)

    def _pass(self, ids: Tensor, mask: Tensor, positions: Tensor, column: Tensor, *others: Tensor) -> Tensor:
        num_states = len(others) - len(self._parameters)
        cache = DecodeCache.of_states(column, others[:num_states], width=mask.shape[-1])
        options = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "past_key_values": cache,
            "use_cache": True,
        }
        with self._replaced(others[num_states:]):
            return self._model(**options).logits[:, -1]

    @contextlib.contextmanager
    def _replaced(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Tensors in the place of the parameters; torch's functional_call is not to be had in a record."""
        number = {id(parameter): n for n, parameter in enumerate(self._parameters)}
        places = [
            (module, name, parameter)
            for module in self._model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        for module, name, parameter in places:
            module._parameters[name] = tensors[number[id(parameter)]]  # type: ignore[assignment]
        try:
            yield
        finally:
            for module, name, parameter in places:
                module._parameters[name] = parameter
