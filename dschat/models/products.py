"""Linear layers in bf16 on CPUs without instructions for it, where products in fp32 take a third of the time.

Intel's processors have such instructions since Cooper Lake (AVX512_BF16) and Sapphire Rapids (AMX). Without,
oneDNN emulates them: weights and activations are better cast, multiplied in fp32, and the product rounded.
Sums over products are in fp32 either way, so the two ways differ by the order of additions.
"""

import math
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dschat.distributed.device import current_device
from dschat.distributed.process_wide import process_wide
from dschat.runs.measured_choices import MeasuredChoices


class Products:
    """What was found faster. There is one in a process: it is a property of the processor."""

    way = "bf16"


def choose_products(dtype: str, choices: MeasuredChoices) -> None:
    """Time a linear layer both ways, for a run in bf16 on a CPU. Every rank must call it."""
    if dtype != "bf16" or current_device().type != "cpu":
        return
    ways = {way: _trial(way) for way in ("bf16", "fp32")}
    process_wide(Products).way = choices.choose("products of linear layers, bf16", ways, on_one_thread=True)


def _trial(way: str) -> Callable[[], Any]:
    """Forward and backward pass of 512 tokens through a layer of 512 x 512."""

    def run() -> None:
        generator = torch.Generator().manual_seed(0)
        rows, weight = (
            torch.randn(512, 512, generator=generator).bfloat16().requires_grad_() for _ in range(2)
        )
        output = F.linear(rows, weight) if way == "bf16" else linear_in_fp32(rows, weight, None)
        torch.autograd.grad(output, (rows, weight), torch.ones_like(output))

    return run


def use_chosen_products(model: nn.Module) -> None:
    """Have the linear layers of a model compute the way that was chosen. Names, classes, weights stay."""
    if process_wide(Products).way != "fp32":
        return
    for module in model.modules():
        if type(module) in (nn.Linear, Conv1D):
            module.forward = partial(_forward, module)


def _forward(module: Any, x: Tensor) -> Tensor:
    """A linear layer's own `forward`; layers in another precision compute as their class does."""
    if not x.dtype == module.weight.dtype == torch.bfloat16:
        return type(module).forward(module, x)
    return linear_in_fp32(x, module.weight, module.bias, transposed=isinstance(module, Conv1D))


def linear_in_fp32(x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool = False) -> Tensor:
    """`F.linear` of bf16 by products in fp32, forward and backward: [..., K] and [N, K] -> [..., N] in bf16.

    With `transposed` the weight is [K, N].
    """
    output: Tensor = _LinearInFp32.apply(x, weight, bias, transposed, torch.is_grad_enabled())
    return output


class _Scratch(threading.local):
    """fp32 memory that the layers of a thread use one after the other, by what stands in it.

    Made anew for every product, such tensors are most of what a step allocates, and leave holes in the heap.
    """

    def __init__(self) -> None:
        self.memory: dict[str, Tensor] = {}

    def room(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor of that shape, on the CPU."""
        size = math.prod(shape)
        if name not in self.memory or self.memory[name].numel() < size:
            self.memory.pop(name, None)
            self.memory[name] = torch.empty(size)
        return self.memory[name][:size].view(shape)

    def cast(self, name: str, tensor: Tensor) -> Tensor:
        """A copy in fp32."""
        return self.room(name, *tensor.shape).copy_(tensor)


class _LinearInFp32(torch.autograd.Function):
    """Keeps the bf16 tensors alone; a weight is kept as itself, so that ZeRO-3 can gather it again.

    What is computed without gradients is not in scratch memory, as it may be recorded (`decode_modes.py`).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, trains: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.transposed, rows, out = transposed, x.reshape(-1, x.shape[-1]), None
        if trains:
            scratch = process_wide(_Scratch)
            wide, rows = scratch.cast("weight", weight), scratch.cast("inputs", rows)
            out = scratch.room("outputs", len(rows), weight.shape[1 if transposed else 0])
        else:
            wide, rows = weight.float(), rows.float()
        wide = wide if transposed else wide.t()
        if bias is None:
            output = torch.mm(rows, wide, out=out)
        else:
            output = torch.addmm(bias.float(), rows, wide, out=out)
        return output.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        scratch, rows = process_wide(_Scratch), x.reshape(-1, x.shape[-1])
        wide = scratch.cast("outputs", gradient.reshape(-1, gradient.shape[-1]))
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            copy = scratch.cast("weight", weight)
            of_x = torch.mm(
                wide, copy.t() if ctx.transposed else copy, out=scratch.room("inputs", *rows.shape)
            )
            of_x = of_x.to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            rows, out = scratch.cast("inputs", rows), scratch.room("weight", *weight.shape)
            factors = (rows.t(), wide) if ctx.transposed else (wide.t(), rows)
            of_weight = torch.mm(*factors, out=out).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = wide.sum(0).to(gradient.dtype)
        return of_x, of_weight, of_bias, None, None
