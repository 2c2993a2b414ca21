"""The forward pass of one token per row as CUDA graphs: a step costs one launch in place of hundreds.

A graph repeats kernels on the memory that it was captured with. So what a pass reads and writes stands in
buffers that belong to `GraphedPass` and stay from batch to batch, and there is a graph for each number of
rows and each number of columns that is read.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dschat.rlhf.rollout.decode_cache import DecodeCache

KEPT_SHARE = 0.1
"""Buffers that take more of the device's memory are given back between rollouts, and captured again."""


class GraphedPass:
    """`__call__` captures the pass of a shape when it is first made, and from then on replays it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._buffers: dict[str, Tensor] = {}
        self._graphs: dict[tuple[int, int], Callable[[], object]] = {}
        self._pool: Any = None
        self._weights: list[int] = []

    def begin(self) -> None:
        """Before a batch: forget the graphs where the weights are no longer where they were (ZeRO-3)."""
        weights = [parameter.data_ptr() for parameter in self._model.parameters()]
        if weights != self._weights:
            self._forget()
            self._weights = weights

    def end(self) -> None:
        """After a rollout: give back buffers that training may need the memory of."""
        size = sum(buffer.nbytes for buffer in self._buffers.values())
        if size > KEPT_SHARE * device_memory():
            self._forget()
            self._buffers.clear()

    def weights_in_place(self) -> contextlib.AbstractContextManager[None]:
        """Nothing to put there."""
        return contextlib.nullcontext()

    def _forget(self) -> None:
        self._graphs.clear()
        self._pool = None

    def place(self, name: str, values: Tensor) -> Tensor:
        """The values in the buffer of that name, which grows where it is too small."""
        buffer = self._buffers.get(name)
        if buffer is None or any(a > b for a, b in zip(values.shape, buffer.shape, strict=True)):
            sizes = values.shape if buffer is None else torch.Size(map(max, values.shape, buffer.shape))
            buffer = self._buffers[name] = values.new_zeros(sizes)
            self._forget()
        return buffer[tuple(map(slice, values.shape))].copy_(values)

    def __call__(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DecodeCache) -> Tensor:
        """The logits that follow one token per row: [B, 1], mask [B, 1, 1, W], [B, 1] -> [B, V].

        All but the ids must stand in buffers of this object.
        """
        ids, shape = self.place("ids", ids), (len(ids), cache.width)
        if shape not in self._graphs:
            view = DecodeCache.of_states(cache.column, cache.states, width=cache.width)
            run = partial(self._pass, ids, mask, positions, view)
            logits = on_side_stream(run)  # libraries prepare what they need before a capture
            logits = self.place("logits", logits)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._graphs[shape] = captured(lambda: logits.copy_(run()), self._pool)
        self._graphs[shape]()
        return self._buffers["logits"][: len(ids)].clone()

    def _pass(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DecodeCache) -> Tensor:
        options: dict[str, Any] = {"attention_mask": mask, "position_ids": positions, "use_cache": True}
        return self._model(input_ids=ids, past_key_values=cache, **options).logits[:, -1]


def device_memory() -> int:
    """Bytes of the current GPU."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def on_side_stream(run: Callable[[], Tensor]) -> Tensor:
    """What `run` returns, computed in another stream, as a first pass before a capture is to be."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = run()
    torch.cuda.current_stream().wait_stream(stream)
    return result


def captured(run: Callable[[], object], pool: Any) -> Callable[[], object]:
    """What repeats the kernels of `run`. What they pass on to each other is in the memory of `pool`.

    Other threads, such as NCCL's watchdog, may go on calling CUDA meanwhile.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        run()
    return graph.replay
