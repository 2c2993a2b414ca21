"""Decoding as CUDA graphs: a forward pass of one token per row, and a draw, cost a launch each, not hundreds.

A graph repeats kernels on the memory that it was captured with. So what is read and written stands in buffers
that belong to `GraphedPass` and stay from batch to batch, and there is a graph for each number of rows and
each number of columns that is read.
"""

import contextlib
import gc
import importlib.util
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from dschat.distributed.device import KEPT_SHARE
from dschat.rlhf.rollout.decode_cache import DecodeCache
from dschat.rlhf.rollout.fused_projections import FusedProjections
from dschat.rlhf.rollout.keyed_sampling import TokenDraw

Run = Callable[[], dict[str, Tensor]]
"""Computes tensors by name."""


def has_kernels() -> bool:
    """Whether `decode_kernels` can be used."""
    return importlib.util.find_spec("triton") is not None


class GraphedPass:
    """`__call__` captures the pass of a shape when it is first made, and from then on replays it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._buffers: dict[str, Tensor] = {}
        self._graphs: dict[Hashable, tuple[Callable[[], object], dict[str, Tensor]]] = {}
        """What replays each, and the buffers of its results."""
        self._pool: Any = None
        self._weights: list[int] = []
        self._projections = FusedProjections(model)
        self._store: Callable[..., None] | None = None
        if has_kernels():
            from dschat.rlhf.rollout.decode_kernels import store_token

            self._store = store_token

    def begin(self) -> None:
        """Before a batch: take the weights of now, and forget the graphs of others that were elsewhere."""
        weights = [parameter.data_ptr() for parameter in self._model.parameters()]
        if weights != self._weights:
            self._forget()
            self._weights = weights
        self._projections.refresh()

    def end(self) -> None:
        """After a rollout: give back buffers that training may need the memory of."""
        size = self._projections.size + sum(buffer.nbytes for buffer in self._buffers.values())
        if size > KEPT_SHARE * device_memory():
            self._forget()
            self._buffers.clear()
            self._projections.free()

    def weights_in_place(self) -> contextlib.AbstractContextManager[None]:
        """The model's own weights read prompts."""
        return contextlib.nullcontext()

    def place(self, name: str, values: Tensor) -> Tensor:
        """The values in the buffer of that name, which grows where it is too small."""
        buffer = self._buffers.get(name)
        if buffer is None or any(a > b for a, b in zip(values.shape, buffer.shape, strict=True)):
            sizes = values.shape if buffer is None else torch.Size(map(max, values.shape, buffer.shape))
            buffer = self._buffers[name] = values.new_zeros(sizes)
            self._forget()
        placed = buffer[tuple(map(slice, values.shape))]
        if values.data_ptr() != placed.data_ptr() or values.stride() != placed.stride():
            placed.copy_(values)
        return placed

    def __call__(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DecodeCache) -> Tensor:
        """The logits that follow one token per row: [B, 1], mask [B, 1, 1, W], [B, 1] -> [B, V].

        All but the ids must stand in buffers of this object. The logits do as well, until the next pass.
        """
        ids = self.place("ids", ids)

        def prepared() -> Run:
            view = DecodeCache.of_states(cache.column, cache.states, width=cache.width, store=self._store)
            options: dict[str, Any] = {"attention_mask": mask, "position_ids": positions, "use_cache": True}

            def logits() -> dict[str, Tensor]:
                with self._projections.in_place():
                    output = self._model(input_ids=ids, past_key_values=view, **options)
                return {"logits": output.logits[:, -1]}

            return logits

        return self._replayed((len(ids), cache.width), prepared)["logits"]

    def draw(self, draw: TokenDraw, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `draw` returns for logits [B, V] and uniforms [B], until the next draw."""
        placed = self.place("logits", logits), self.place("uniforms", uniforms)

        def drawn() -> dict[str, Tensor]:
            tokens, logprobs = draw(*placed)
            return {"tokens": tokens} | ({} if logprobs is None else {"logprobs": logprobs})

        found = self._replayed((len(logits), draw), lambda: drawn)
        return found["tokens"], found.get("logprobs")

    def _replayed(self, key: Hashable, prepared: Callable[[], Run]) -> dict[str, Tensor]:
        """What the run computes, in the buffers of its names, by the graph of that key.

        Where there is a graph, nothing is prepared: a tensor that is made would wait for the GPU.
        """
        if key not in self._graphs:
            run = prepared()
            first = on_side_stream(run)  # libraries prepare what they need before a capture
            places = {name: self.place(name, values) for name, values in first.items()}

            def computed() -> None:
                for name, values in run().items():
                    places[name].copy_(values)

            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._graphs[key] = captured(computed, self._pool), places
        replay, results = self._graphs[key]
        replay()
        return results

    def _forget(self) -> None:
        self._graphs.clear()
        self._pool = None


def device_memory() -> int:
    """Bytes of the current GPU."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def on_side_stream(run: Run) -> dict[str, Tensor]:
    """What `run` returns, computed in another stream, as a first pass before a capture is to be."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = run()
    torch.cuda.current_stream().wait_stream(stream)
    return result


def captured(run: Callable[[], object], pool: Any) -> Callable[[], object]:
    """What repeats the kernels of `run`. What they pass on to each other is in the memory of `pool`.

    Other threads, such as NCCL's watchdog, may go on calling CUDA meanwhile. Python's garbage collector may
    not: a graph that it finds then cannot be freed, and ends the capture.
    """
    graph, was_enabled = torch.cuda.CUDAGraph(), gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            run()
    finally:
        if was_enabled:
            gc.enable()
    return graph.replay
