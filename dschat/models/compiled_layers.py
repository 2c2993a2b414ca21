"""torch.compile of a decoder's layers, for the passes that learn and score."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache


def compile_layers(model: nn.Module, config: Any) -> int:
    """Compile the decoder layers of a model of this configuration, in place; returns how many there are.

    All layers share the compiled code, so the time it takes does not grow with the depth. The sizes of batch
    and rows are left open in it, so that batches of other sizes compile nothing again. Passes with a cache of
    keys and values, which are generation's, run uncompiled. Names, classes and weights stay.
    """
    depth = config.get_text_config().num_hidden_layers
    stacks = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    layers = list(next(stacks, []))
    for layer in layers:
        layer.forward = _compiled(layer.forward)
    return len(layers)


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(forward, dynamic=True)

    def call(*args: Any, **options: Any) -> Any:
        has_cache = any(isinstance(value, Cache) for value in (*args, *options.values()))
        return (forward if has_cache else compiled)(*args, **options)

    return call
