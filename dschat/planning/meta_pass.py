"""What a pass over rows of tokens holds and does, found by making it on the meta device, without weights.

A pass through the real modules of a model of one layer and of one of two tells what each further layer adds.
So every family, attention and precision is counted as it is, and nothing is allocated. In the place of
attention that computes in blocks stands a function that keeps queries, keys, values, output and a number per
row.
"""

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv

from dschat.models.attention import WAYS

BLOCKWISE = "dschat_planned"
"""The name in transformers' table of the attention that stands in for those that compute in blocks."""


@dataclass(frozen=True)
class Work:
    """Operations one after the other, as `(floating-point operations, bytes read and written)`."""

    parts: tuple[tuple[float, float], ...] = ()

    @property
    def flops(self) -> float:
        """All floating-point operations."""
        return sum(flops for flops, _ in self.parts)

    def seconds(self, *, flops_per_second: float, bytes_per_second: float, overhead: float) -> float:
        """Each part takes the longer of computing and moving, and `overhead` seconds to start."""
        return sum(max(f / flops_per_second, b / bytes_per_second) + overhead for f, b in self.parts)


@dataclass(frozen=True)
class PassCost:
    """Bytes and work of one forward pass, or of one forward and backward pass."""

    saved: float
    """Bytes that the forward pass leaves for the backward pass, logits among them."""
    peak: float
    """Bytes at the worst moment beside weights and gradients."""
    logits: float
    """Bytes of the logits and their gradient at that moment."""
    first: Work
    """The work of a model of one layer."""
    layer: Work
    """What each further layer adds."""
    num_layers: int

    def seconds(self, **rates: float) -> float:
        """Seconds at the rates of `Work.seconds`."""
        return self.first.seconds(**rates) + (self.num_layers - 1) * self.layer.seconds(**rates)

    @property
    def flops(self) -> float:
        """Floating-point operations of the pass."""
        return self.first.flops + (self.num_layers - 1) * self.layer.flops


class Recorder(TorchDispatchMode):
    """Counts the bytes of storages that live, and the work of every operation, while it is on."""

    def __init__(self, known: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.parts: list[tuple[float, float]] = []
        self._alive = {t.untyped_storage()._cdata for t in (*known.parameters(), *known.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        results = [x for x in (output if isinstance(output, tuple | list) else [output]) if is_tensor(x)]
        for result in results:
            self._note(result.untyped_storage())
        if not (func.is_view or "empty" in func.__name__ or "detach" in func.__name__):
            flops = flop_registry.get(func.overloadpacket, lambda *a, **k: 0)
            moved = sum(_bytes(x) for x in (*args, *results) if is_tensor(x))
            self.parts.append((flops(*args, **(kwargs or {}), out_val=output), moved))
        return output

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor."""
    return isinstance(value, Tensor)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Blockwise(torch.autograd.Function):
    """Attention that keeps no probabilities: [B, H, L, D] each -> [B, H, L, D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, sums = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        _note_attention(query, key, products=2)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        _note_attention(query, key, products=5)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _note_attention(query: Tensor, key: Tensor, *, products: int) -> None:
    """Add the products of causal attention, each over half of the square, to the recorder that is on."""
    mode = torch.utils._python_dispatch._get_current_dispatch_mode()
    if isinstance(mode, Recorder):
        flops = products * query.numel() * key.shape[2]
        mode.parts.append((flops, 2 * (_bytes(query) + _bytes(key))))


def _blockwise(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, dtype: torch.dtype, **_: Any
) -> tuple[Tensor, None]:
    """What transformers' attention functions return; computed in `dtype`."""
    groups = getattr(module, "num_key_value_groups", 1)
    wide = (query, repeat_kv(key, groups), repeat_kv(value, groups))
    output = _Blockwise.apply(*(x.to(dtype) for x in wide)).to(query.dtype)
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


def with_layers(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """The same model with so many layers."""
    config = copy.deepcopy(config)
    whole = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == whole:  # one entry per layer, such as layer_types
            setattr(config, name, value[:num_layers])
    config.num_hidden_layers = num_layers
    return config


@dataclass(frozen=True)
class Rows:
    """What a pass reads."""

    rows: int
    length: int
    """Tokens per row."""
    outputs: int
    """Positions per row whose logits are computed."""


def pass_cost(
    build: Callable[[PretrainedConfig], nn.Module],
    config: PretrainedConfig,
    rows: Rows,
    *,
    dtype: torch.dtype,
    way: str = "sdpa",
    trains: bool,
) -> PassCost:
    """The cost of a pass over `rows`, forward and with `trains` backward.

    `build` makes a model of a configuration on the meta device, in the mode in which it makes passes. `way`
    names the attention.
    """
    traces = []
    for num_layers in (1, 2):
        few = with_layers(config, num_layers)
        try:
            with _attention(few, way, dtype):
                traces.append(_trace(build(few), rows, trains=trains))
        except KeyError:  # GPT-J and Falcon look their attention up in tables of their own
            few._attn_implementation = "eager"
            traces.append(_trace(build(few), rows, trains=trains))
    first, second = traces
    num_layers = config.num_hidden_layers
    more = num_layers - 1
    size = len(first[3])
    return PassCost(
        saved=first[0] + more * (second[0] - first[0]),
        peak=first[1] + more * (second[1] - first[1]),
        logits=first[2],
        first=Work(tuple(first[3])),
        layer=Work(tuple(_difference(first[3], second[3]))) if size else Work(),
        num_layers=num_layers,
    )


def _difference(
    first: list[tuple[float, float]], second: list[tuple[float, float]]
) -> list[tuple[float, float]]:
    """The operations of `second` that are not among those of `first`."""
    left: dict[tuple[float, float], int] = {}
    for part in first:
        left[part] = left.get(part, 0) + 1
    found = []
    for part in second:
        if left.get(part, 0):
            left[part] -= 1
        else:
            found.append(part)
    return found


def _trace(
    model: nn.Module, rows: Rows, *, trains: bool
) -> tuple[float, float, float, list[tuple[float, float]]]:
    """Bytes after the forward pass, at the worst moment, of logits; and the operations."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None  # gradients are counted with the weights, by how they are sharded

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop)
    ids = torch.zeros(rows.rows, rows.length, dtype=torch.long, device="meta")
    mask = torch.ones_like(ids)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    is_language_model = hasattr(model, "get_output_embeddings")
    if is_language_model:
        inputs["logits_to_keep"] = torch.arange(rows.outputs, device="meta")
    else:
        inputs["return_values"] = True
    with Recorder(model) as recorder, torch.set_grad_enabled(trains):
        outputs = model(**inputs)
        outputs = outputs.logits if is_language_model else outputs
        loss, logits = _Loss.apply(outputs), float(_bytes(outputs)) if is_language_model else 0.0
        del outputs
        saved = recorder.now
        if trains:
            loss.backward()
    return saved, recorder.peak, logits * (2 if trains else 1), recorder.parts
