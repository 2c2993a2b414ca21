"""Frozen models whose whole weights are in CPU memory between uses, at the ZeRO stages below 3.

At stage 3 DeepSpeed's own offloading of parameters does it, a layer at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn


class RestingWeights:
    """The weights of a frozen model: in CPU memory, pinned where there is a GPU, and on the device in use.

    They never change, so a use ends by letting the copies on the device go. Buffers, which are small, stay.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device, self._num_uses = device, 0
        self._at_rest = [(p, _on_cpu(p.data)) for p in module.parameters()]
        self._let_go()
        module.register_forward_pre_hook(self._check)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The weights on the device inside the block; blocks may nest."""
        if self._num_uses == 0:
            for parameter, weight in self._at_rest:
                parameter.data = weight.to(self._device, non_blocking=True)
        self._num_uses += 1
        try:
            yield
        finally:
            self._num_uses -= 1
            if self._num_uses == 0:
                self._let_go()

    def _let_go(self) -> None:
        for parameter, weight in self._at_rest:
            parameter.data = weight

    def _check(self, *_: object) -> None:
        assert self._num_uses, "a model at rest is passed: surround the pass by `in_use`"


def rest(engine: DeepSpeedEngine) -> None:
    """Keep a frozen engine's weights in CPU memory outside of `in_use`."""
    engine.resting_weights = RestingWeights(engine.module, torch.device(engine.device))
    get_accelerator().empty_cache()


@contextmanager
def in_use(engine: DeepSpeedEngine) -> Iterator[DeepSpeedEngine]:
    """The engine, with its weights on its device inside the block; one that does not rest stays as it is."""
    weights = getattr(engine, "resting_weights", None)
    if weights is None:
        yield engine
        return
    with weights.in_use():
        yield engine


def _on_cpu(weight: torch.Tensor) -> torch.Tensor:
    on_cpu = weight.cpu()
    return on_cpu if weight.device == on_cpu.device else get_accelerator().pin_memory(on_cpu)
