"""A model whose layers are shared out among ranks: DeepSpeed's PipelineModule over `dschat.models.stage`.

Every rank of a pipeline reads the same micro-batches and runs `TransformerStage`; hidden states go forward,
their gradients back, by DeepSpeed's 1F1B schedule (https://arxiv.org/abs/1806.03377). The last stage alone
calls the functions of a step that compute losses and metrics, with the engine in the place of the model.
"""

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, repeat
from typing import Any

import torch
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from dschat.distributed.collectives import all_gather_object
from dschat.distributed.mesh import mesh
from dschat.models.forward import hidden_states_of
from dschat.models.stage import continue_from, tied_embedding

TIED = "embeddings"
"""The name of tied weights among those of DeepSpeed's module."""

EVALUATED_AT_ONCE = 16
"""Micro-batches that go through a pipeline together in evaluations."""


class TransformerStage(nn.Module):
    """This rank's part of a model, as one layer of DeepSpeed's module."""

    work: Callable[[Tensor], Tensor]
    """What is done with the hidden states of the next micro-batch; `PipelinedEngine` says what."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden: Tensor) -> Tensor:
        return self.work(hidden)


def pipeline_module(model: nn.Module) -> PipelineModule:
    """DeepSpeed's module for a model that `create_hf_model` cut to this rank's stage. Every rank calls it.

    Each stage has two layers: its part of the model, and the tied embeddings or nothing. The latter pass
    hidden states on; they tell DeepSpeed which weights' gradients the first and the last stage add up.
    """
    stage = mesh().pipeline
    tied = tied_embedding(model, stage)
    is_tied = any(all_gather_object(tied is not None, axis="pipeline"))
    layers: list[Any] = []
    for number in range(stage.size):
        layers.append(TransformerStage(model) if number == stage.rank else _pass_on)
        is_end = is_tied and number in (0, stage.size - 1)
        layers.append(_tied_layer(tied) if is_end else _pass_on)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints how it divides the layers
        module = PipelineModule(
            layers,
            topology=PipeModelDataParallelTopology(
                num_pp=stage.size, num_mp=mesh().tensor.size, num_dp=mesh().data.size
            ),
            partition_method="uniform",
            dynamic_shape=True,
        )
    for parameter in module.parameters():
        # DeepSpeed's norms count a weight of another rank than the first of stages and tensor ranks where it
        # says so; AutoTP says so of its shards.
        parameter.model_parallel = is_counted(parameter) and mesh().tensor.rank == 0
    return module


class PipelinedEngine:
    """One stage's DeepSpeed engine. What it does not define itself is the engine's.

    Inside `train` and `evaluate` it can be called as a model is, in the last stage.
    """

    skip_reason: str | None = None
    num_bad_losses: Tensor | int = 0

    def __init__(self, engine: DeepSpeedEngine, model: nn.Module) -> None:
        self.deepspeed, self.module = engine, model
        self._stage = next(part for part in engine.module.modules() if isinstance(part, TransformerStage))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.deepspeed, name)

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def train_batch(
        self, micro_batches: Sequence[Any], loss_and_metrics: Callable[[Any], dict[str, Tensor]]
    ) -> list[dict[str, Tensor]]:
        """An optimiser step; returns the metrics of each micro-batch in the last stage, nothing in others.

        The loss is as in `engines.step.backward_on`.
        """
        factor = mesh().data.size * self.deepspeed.gradient_accumulation_steps()

        def loss_of(metrics: dict[str, Tensor]) -> Tensor:
            self.num_bad_losses += (~metrics["loss"].detach().isfinite()).int()
            return metrics["loss"] * factor

        self.num_bad_losses = 0
        results = self._work_on(micro_batches, loss_and_metrics, loss_of)
        self.deepspeed.micro_batches = len(micro_batches)
        self.deepspeed.train_batch(_nothing())
        return results

    def evaluate(self, batches: Iterable[Any], function: Callable[[Any], Any]) -> Iterator[Any]:
        """What `function` returns of each batch in the last stage, in order; nothing in other stages."""
        rest = iter(batches)
        while some := list(islice(rest, EVALUATED_AT_ONCE)):
            results = self._work_on(some, function, lambda _: torch.zeros((), device=self.deepspeed.device))
            self.deepspeed.eval_batch(
                _nothing(), compute_loss=False, reduce_output=None, num_micro_batches=len(some)
            )
            yield from results

    def _work_on(
        self, batches: Sequence[Any], function: Callable[[Any], Any], output_of: Callable[[Any], Tensor]
    ) -> list[Any]:
        """Have the next passes work on these batches in order; the list fills in the last stage."""
        rest, results = iter(batches), []

        def work(hidden: Tensor) -> Tensor:
            batch = next(rest).to(self.deepspeed.device)
            continue_from(self.module, hidden)
            if not self.deepspeed.is_last_stage():
                return hidden_states_of(self, getattr(batch, "tokens", batch)).contiguous()
            results.append(function(batch))
            return output_of(results[-1])

        self._stage.work = work
        return results


def results_of(model: Any, batches: Iterable[Any], function: Callable[[Any], Any]) -> Iterator[Any]:
    """What `function`, which calls `model`, returns of each batch on the model's device, in order.

    In a pipeline only its last stage has results: `of_last_stage` tells the others. Every rank calls it.
    """
    if isinstance(model, PipelinedEngine):
        return model.evaluate(batches, function)
    return (function(batch) for batch in batches)


def of_last_stage(value: Any) -> Any:
    """The value, which JSON can hold, of the last stage of a pipeline, on every rank of it."""
    return all_gather_object(value, axis="pipeline")[-1]


def is_counted(parameter: Tensor) -> bool:
    """Whether a weight is this rank's to count, and not a copy of another stage's."""
    return not getattr(parameter, "ds_pipe_replicated", False)


def _pass_on(hidden: Tensor) -> Tensor:
    return hidden


def _tied_layer(embedding: nn.Module | None) -> TiedLayerSpec:
    """Tied weights, which are built in their stages alone."""
    return TiedLayerSpec(
        TIED,
        nn.ModuleList,
        [embedding],
        forward_fn=lambda _, hidden: hidden,
        tied_weight_attr="0.weight",
    )


def _nothing() -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and labels for DeepSpeed's schedule, which `TransformerStage` does not read."""
    return repeat((torch.zeros(1), torch.zeros(1)))
