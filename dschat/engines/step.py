"""One optimiser step of a DeepSpeed engine."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor
from torch.profiler import record_function

from dschat.distributed import deepspeed_private
from dschat.distributed.collectives import (
    max_across_ranks,
    norm_across_tensor_ranks,
    sum_across_ranks,
)
from dschat.distributed.device import current_device
from dschat.distributed.mesh import mesh
from dschat.engines.memory_remedies import PhaseKind
from dschat.engines.out_of_memory import phase
from dschat.engines.pipeline import PipelinedEngine, is_counted, of_last_stage

LossAndMetrics = Callable[[Any], dict[str, Tensor]]
"""A function of a micro-batch on the engine's device: "loss", which is minimised, and metrics, each a scalar.

They are the micro-batch's shares of the optimiser step's: they are added over micro-batches and ranks."""


def train_step(
    engine: DeepSpeedEngine,
    micro_batches: Sequence[Any],
    loss_and_metrics: LossAndMetrics,
    *,
    role: str = "model",
    end_of: Callable[[str], None] = lambda phase: None,
) -> dict[str, float]:
    """Train on the micro-batches of one optimiser step; return loss and metrics of the whole step.

    They are the sums over micro-batches and ranks. A step that is not finite is skipped, and
    `skipped_because` says why. `role` is the model's in messages; `end_of` is told of each part's end, by the
    names of `engines.speed.PHASES`. Every rank must call it, with as many micro-batches as the others; their
    number may differ from step to step and from the engine's gradient_accumulation_steps.
    """
    engine.train()
    if isinstance(engine, PipelinedEngine):
        with phase(PhaseKind.TRAINING, role):
            parts = engine.train_batch(micro_batches, loss_and_metrics)
        _note_skipped(engine)
        end_of("forward_backward")
        return of_last_stage(_totals(parts) if parts else None)
    parts = []
    for number, batch in enumerate(micro_batches, start=1):
        engine.set_gradient_accumulation_boundary(number == len(micro_batches))
        with phase(PhaseKind.TRAINING, role):
            with record_function("forward"):
                metrics = loss_and_metrics(batch.to(engine.device))
            backward_on(engine, metrics["loss"])
            end_of("forward_backward")
            take_step(engine)
            end_of("optimizer")
        parts.append({name: share.detach() for name, share in metrics.items()})
    totals = _totals(parts)
    end_of("optimizer")
    return totals


def _totals(parts: list[dict[str, Tensor]]) -> dict[str, float]:
    """The sums of the micro-batches' metrics, over all ranks of data."""
    shares = torch.stack([torch.stack([share.detach().float() for share in part.values()]) for part in parts])
    return dict(zip(parts[0], sum_across_ranks(shares.sum(dim=0), axis="data").tolist(), strict=True))


def train_on(engine: DeepSpeedEngine, loss: Tensor) -> None:
    """Backward and, at the accumulation boundary, the optimiser step; of a loss as in `backward_on`."""
    backward_on(engine, loss)
    take_step(engine)


def backward_on(engine: DeepSpeedEngine, loss: Tensor) -> None:
    """Add a loss's gradients.

    `loss` is this micro-batch's share of the optimiser step's loss: shares are to be ADDED over micro-batches
    and ranks. DeepSpeed averages over both, which the factor undoes.
    A step whose gradient is not finite on any rank is skipped on all: weights, moments and schedule stay as
    they are, and `skipped_because` says why.
    """
    engine.num_bad_losses = engine.num_bad_losses + (~loss.detach().isfinite()).int()
    with record_function("backward"):
        factor = mesh().zero_size * engine.gradient_accumulation_steps()
        engine.backward(loss * (factor * _forgotten_scale(engine)))


def _forgotten_scale(engine: DeepSpeedEngine) -> float:
    """What DeepSpeed divides fp16 gradients by in a step whose loss its `backward` has not multiplied by it.

    In 0.19.8 that is so without ZeRO: runtime/engine.py, line 3417, asks for a ZeROOptimizer. Else 1.
    """
    optimizer = engine.optimizer
    return 1.0 if isinstance(optimizer, ZeROOptimizer) else float(getattr(optimizer, "loss_scale", 1.0))


def take_step(engine: DeepSpeedEngine) -> None:
    """The optimiser step, at the accumulation boundary."""
    is_last = engine.is_gradient_accumulation_boundary()
    if is_last and isinstance(engine.optimizer, torch.optim.AdamW):  # no wrapper of DeepSpeed's around it
        measure_gradient(engine)
    scale = _forgotten_scale(engine)
    with record_function("optimizer"):
        engine.step()
    if is_last:
        _note_skipped(engine)
        if scale != 1:
            set_gradient_norm(engine, gradient_norm(engine) / scale)


def _note_skipped(engine: DeepSpeedEngine) -> None:
    """Find out whether the optimiser step was skipped, and why."""
    num_bad = torch.as_tensor(engine.num_bad_losses, device=current_device())
    was_loss = not engine.was_step_applied() and max_across_ranks(num_bad, axis="world") > 0
    engine.skip_reason = None if engine.was_step_applied() else ("loss" if was_loss else "gradient")
    engine.num_bad_losses = 0


def skipped_because(engine: DeepSpeedEngine) -> Literal["loss", "gradient"] | None:
    """What was not finite in the last optimiser step, which was skipped for it: the loss of some rank, or the
    gradient alone. None where the step was taken."""
    return engine.skip_reason


def measure_gradient(engine: DeepSpeedEngine) -> None:
    """fp32 without ZeRO: DeepSpeed clips the gradients, but keeps no norm and takes any for an update.

    They are reduced already, so every rank finds the same. `overflow` tells DeepSpeed of a skipped step.
    """
    whole: list[Tensor] = []
    shards: list[Tensor] = []
    for parameter in engine.module.parameters():
        if parameter.grad is not None and is_counted(parameter):
            (shards if deepspeed_private.is_tensor_shard(parameter) else whole).append(parameter.grad)
    norm = norm_across_tensor_ranks(whole, shards)
    if isinstance(engine, PipelineEngine):
        norm = sum_across_ranks(norm**2, axis="pipeline").sqrt().to(norm)
    deepspeed_private.set_gradient_norm(engine, norm)
    deepspeed_private.set_overflow(engine, not norm.isfinite())


def take_steps_together(engines: list[DeepSpeedEngine]) -> None:
    """The optimiser steps of fp16 engines, of all or, where gradients of one overflowed, of none.

    Each has had its `backward_on`. One that is skipped for another's sake keeps its loss scale, and its
    schedule waits with the other's. Every rank must call it.
    """
    overflows = [
        engine.is_gradient_accumulation_boundary() and deepspeed_private.has_overflow(engine)
        for engine in engines
    ]
    for engine, overflowed in zip(engines, overflows, strict=True):
        waits = any(overflows) and not overflowed
        with deepspeed_private.skipping(engine) if waits else contextlib.nullcontext():
            take_step(engine)


def learning_rate(engine: DeepSpeedEngine) -> float:
    """The learning rate of the next optimiser step, the adapters' where the model has some."""
    return engine.get_lr()[0]


def gradient_norm(engine: DeepSpeedEngine) -> float:
    """The gradient's norm before clipping in the last optimiser step, 0 where there is none."""
    norm = engine.get_global_grad_norm()
    return float(norm) if norm is not None else 0.0


def set_gradient_norm(engine: DeepSpeedEngine, norm: float) -> None:
    """Go on with the norm that `gradient_norm` gave before a checkpoint, until the next optimiser step."""
    deepspeed_private.set_gradient_norm(engine, norm)
