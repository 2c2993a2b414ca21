"""What a pass over rows of tokens holds, found by making one on the meta device, without weights.

One pass of a model of two layers over a row of a prime number of tokens tells it all: whether a block of
memory grows with the tokens is whether the prime divides its size, and each further layer adds what the
second one did. So every family, attention and precision is counted as it is, and nothing is allocated.
In the place of attention that computes in blocks stands a function that keeps queries, keys, values, output
and a number per row; in that of the experts' grouped products one that has only their sizes.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import inf, isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv

from dschat.models.attention import WAYS

BLOCKWISE = "dschat_planned"
"""The name in transformers' table of the attention that stands in for those that compute in blocks."""
NUM_LAYERS = 2
COLUMNS = 251
"""Tokens of the row, a prime."""
SOME = 127
"""How many of them have logits where not all do, another prime."""


@dataclass(frozen=True)
class Rows:
    """What a pass reads."""

    rows: int
    length: int
    """Tokens per row."""
    outputs: int
    """Positions per row whose logits are computed."""

    @property
    def all_have_logits(self) -> bool:
        """Whether logits are computed at every position."""
        return self.outputs == self.length


@dataclass(frozen=True)
class Block:
    """Memory of one storage, in bytes per token (power 1), per pair of tokens of a row (2) or output (0)."""

    bytes: float
    power: int

    def size(self, rows: Rows) -> float:
        """Bytes for these rows."""
        of_row = rows.outputs if self.power == 0 else rows.length**self.power
        return self.bytes * rows.rows * of_row


Blocks = Counter[Block]


@dataclass(frozen=True)
class PassShape:
    """The blocks of a forward pass, or of a forward and a backward pass, beside weights and gradients."""

    saved: Blocks
    """What the forward pass of `NUM_LAYERS` leaves for the backward pass."""
    layer: Blocks
    """What each further layer leaves."""
    moments: tuple[Blocks, Blocks]
    """What is there when all blocks together are largest, and when those of tokens are."""
    allocated: Blocks
    """All that the forward pass of `NUM_LAYERS` asks for, whether it keeps it or not."""
    allocated_layer: Blocks
    """What each further layer asks for."""
    logits: Block | None
    """The logits; None of a model without."""
    num_layers: int

    def peak(self, rows: Rows) -> float:
        """Bytes at the worst moment."""
        return max(_bytes_of(moment, rows) for moment in (*self.moments, self.saved)) + self._further(rows)

    def kept(self, rows: Rows, *, below: float = inf) -> float:
        """Bytes that the forward pass leaves for the backward pass, logits among them, in blocks `below` a
        size in bytes."""
        return _bytes_of(self.saved, rows, below) + self._further(rows, below)

    def freed(self, rows: Rows, *, below: float) -> float:
        """Bytes in such blocks that the forward pass allocates and does not leave."""
        further = (self.num_layers - NUM_LAYERS) * _bytes_of(self.allocated_layer, rows, below)
        return _bytes_of(self.allocated, rows, below) + further - self.kept(rows, below=below)

    def _further(self, rows: Rows, below: float = inf) -> float:
        return (self.num_layers - NUM_LAYERS) * _bytes_of(self.layer, rows, below)


def _bytes_of(blocks: Blocks, rows: Rows, below: float = inf) -> float:
    sizes = ((block.size(rows), number) for block, number in blocks.items())
    return sum(number * size for size, number in sizes if size < below)


class Recorder(TorchDispatchMode):
    """Follows the storages that live while it is on, and whose size is that of tokens."""

    def __init__(self, known: nn.Module, columns: int, outputs: int) -> None:
        super().__init__()
        self.now: Blocks = Counter()
        self.allocated: Blocks = Counter()
        self.moments: list[Blocks] = [Counter(), Counter()]
        self._columns, self._outputs = columns, outputs
        self._most = [0.0, 0.0]
        self._bytes = [0.0, 0.0]
        self._alive = {t.untyped_storage()._cdata for t in (*known.parameters(), *known.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        grouped = func is torch.ops.aten._grouped_mm.default
        output = _grouped_product(*args, **(kwargs or {})) if grouped else func(*args, **(kwargs or {}))
        for result in output if isinstance(output, tuple | list) else [output]:
            if isinstance(result, Tensor):
                self._note(result)
        return output

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        block = self._block(storage.nbytes(), tensor.element_size())
        if block is None:  # a gradient of weights, which is counted with them, by how it is sharded
            return
        self._alive.add(key)
        self.now[block] += 1
        self.allocated[block] += 1
        self._bytes[0] += storage.nbytes()
        self._bytes[1] += storage.nbytes() * bool(block.power)
        for i, most in enumerate(self._most):
            if self._bytes[i] > most:
                self._most[i], self.moments[i] = self._bytes[i], Counter(self.now)
        weakref.finalize(storage, self._free, key, block, storage.nbytes())

    def _block(self, size: int, element: int) -> Block | None:
        columns, numbers = self._columns, size // element
        if numbers % columns**2 == 0:
            return Block(size / columns**2, 2)
        if numbers % columns == 0:
            return Block(size / columns, 1)
        return Block(size / self._outputs, 0) if numbers % self._outputs == 0 else None

    def _free(self, key: int, block: Block, size: int) -> None:
        self._alive.discard(key)
        self.now[block] -= 1
        self._bytes = [self._bytes[0] - size, self._bytes[1] - size * bool(block.power)]


def _grouped_product(
    first: Tensor, second: Tensor, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None
) -> Tensor:
    """The empty result of torch's product by groups, which has a meta version for 16 bits alone."""
    groups = [] if offs is None or first.dim() != 2 or second.dim() != 2 else [len(offs)]
    groups = [len(first)] if first.dim() == second.dim() == 3 else groups
    return first.new_empty(*groups, first.shape[-2], second.shape[-1], dtype=out_dtype or first.dtype)


class _Blockwise(torch.autograd.Function):
    """Attention that keeps no probabilities: [B, H, L, D] each -> [B, H, L, D], on copies in `dtype`."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *inputs: Tensor) -> Tensor:
        wide = [x.to(dtype) for x in inputs]
        output, sums = torch.empty_like(wide[0]), wide[0].new_empty(wide[0].shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(*inputs, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors[:3]
        wide = [x.to(gradient.dtype) for x in kept]
        found = [torch.empty_like(x) for x in wide]
        return None, *(x.to(narrow.dtype) for x, narrow in zip(found, kept, strict=True))


def _blockwise(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, dtype: torch.dtype, **_: Any
) -> tuple[Tensor, None]:
    """What transformers' attention functions return; computed in `dtype`."""
    groups = getattr(module, "num_key_value_groups", 1)
    inputs = (query, repeat_kv(key, groups), repeat_kv(value, groups))
    output = _Blockwise.apply(dtype, *inputs).to(query.dtype)
    return output.transpose(1, 2).contiguous(), None


class _Loss(torch.autograd.Function):
    """What `models/softmax.py` keeps: the logits themselves, whose gradient is as large. -> scalar."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor) -> Tensor:
        ctx.save_for_backward(outputs)
        return outputs.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


@contextmanager
def _attention(config: PretrainedConfig, way: str, dtype: torch.dtype) -> Iterator[None]:
    """Let models of this configuration attend as `way` does, by the names of `models.attention.WAYS`."""
    wide = torch.float32 if way == "sdpa_fp32" else dtype
    function = WAYS["eager"] if way == "eager" else partial(_blockwise, dtype=wide)
    AttentionInterface.register(BLOCKWISE, function)
    before, config._attn_implementation = config._attn_implementation, BLOCKWISE
    try:
        yield
    finally:
        config._attn_implementation = before


def with_layers(config: PretrainedConfig, num_layers: int = NUM_LAYERS) -> PretrainedConfig:
    """The same model with so many layers."""
    config = copy.deepcopy(config)
    whole = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == whole:  # one entry per layer, such as layer_types
            setattr(config, name, (value * num_layers)[:num_layers])
    config.num_hidden_layers = num_layers
    return config


def layers_of(model: nn.Module, num_layers: int = NUM_LAYERS) -> nn.ModuleList:
    """The decoder layers of a model that has so many. Raises `LookupError` where they are no list."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise LookupError(f"{type(model).__name__} has no list of {num_layers} layers")


def columns_of(model: nn.Module, way: str, length: int) -> int:
    """Tokens of the row that stands for rows of `length` tokens: as many where attention is quadratic."""
    return COLUMNS if way != "eager" and _goes_by_tables(model) else _prime_from(length)


def pass_shape(
    model: Any,
    num_layers: int,
    *,
    columns: int,
    all_have_logits: bool,
    dtype: torch.dtype,
    way: str,
    trains: bool,
) -> PassShape:
    """The shape of a pass over a row of `columns` tokens, forward and with `trains` backward.

    `model` has `NUM_LAYERS` on the meta device and stands for one of `num_layers`; `way` names its attention.
    """
    outputs = columns if all_have_logits else SOME
    model.train(trains)
    with _attention(model.config, way, dtype) if _goes_by_tables(model) else nullcontext():
        return _trace(model, num_layers, columns, outputs, trains=trains)


def _goes_by_tables(model: nn.Module) -> bool:
    """Whether attention is looked up by name; GPT-J and Falcon have classes of their own."""
    decoder: Any = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    return bool(decoder._supports_attention_backend)


def _prime_from(number: int) -> int:
    """The first prime of at least `number`, and of more than `SOME`."""
    number = max(number, SOME + 1) | 1
    while any(number % divisor == 0 for divisor in range(3, isqrt(number) + 1, 2)):
        number += 2
    return number


@contextmanager
def _hooked(model: nn.Module, ends: list[tuple[Blocks, Blocks]], recorder: Recorder) -> Iterator[None]:
    """Keep what is there after each layer, and drop gradients of weights."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    def note(*_: Any) -> None:
        ends.append((Counter(recorder.now), Counter(recorder.allocated)))

    trained = [p for p in model.parameters() if p.requires_grad]
    hooks: Iterable[Any] = [
        *(parameter.register_post_accumulate_grad_hook(drop) for parameter in trained),
        *(layer.register_forward_hook(note) for layer in layers_of(model)),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _trace(model: Any, num_layers: int, columns: int, outputs: int, *, trains: bool) -> PassShape:
    ids = torch.zeros(1, columns, dtype=torch.long, device="meta")
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    is_language_model = hasattr(model, "get_output_embeddings")
    if is_language_model:
        inputs["logits_to_keep"] = torch.arange(outputs, device="meta")
    else:
        inputs["return_values"] = True
    ends: list[tuple[Blocks, Blocks]] = []
    recorder = Recorder(model, columns, outputs)
    with recorder, torch.set_grad_enabled(trains), _hooked(model, ends, recorder):
        result = model(**inputs)
        result = result.logits if is_language_model else result
        size = result.untyped_storage().nbytes()
        loss = _Loss.apply(result)
        del result
        saved, allocated = Counter(recorder.now), Counter(recorder.allocated)
        if trains:
            loss.backward()
    power = 1 if outputs == columns else 0
    return PassShape(
        saved=+saved,
        layer=ends[1][0] - ends[0][0] if trains else Counter(),
        allocated=allocated,
        allocated_layer=ends[1][1] - ends[0][1],
        moments=(+recorder.moments[0], +recorder.moments[1]),
        logits=Block(size / outputs, power) if is_language_model else None,
        num_layers=num_layers,
    )
