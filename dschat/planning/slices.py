"""Seconds of a model's passes on this device, from models of few of its layers in engines of their own.

A step is trained with 1 and with 3 layers, with the run's precision, ZeRO stage, adapters and offloading, and
its rows of tokens; what a layer adds is taken as often as the model has layers. So every cost that a run has
is in them: matrix products in the model's own shapes, the start of kernels, gradients as ZeRO takes them, the
optimiser, and what ranks of data send each other, as far as the process that measures has such ranks.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

from dschat.arguments import OptimizerArguments, RunArguments
from dschat.data.token_batch import TokenBatch
from dschat.distributed.device import DTYPES, current_device
from dschat.distributed.zero3 import weights_gathered_for_generation
from dschat.engines.build import build_trained_engine, train_config
from dschat.engines.speed import StepTimes
from dschat.engines.step import DeepSpeedEngine, train_step
from dschat.models.attention import set_attention
from dschat.models.forward import token_logprobs_of
from dschat.models.preflight import meta_model_of
from dschat.planning.meta_pass import Rows, with_layers
from dschat.planning.models import PlannedModel

FEW, MORE = 1, 3
"""Numbers of layers."""
WARM_UP, ROUNDS = 2, 5
"""Steps of a slice that are not timed, and those of which the fastest counts."""

Seconds = dict[str, float]
Decode = Callable[[nn.Module, Rows, Callable[[str], None]], None]
"""Answers rows with a model of few layers: `outputs` tokens after prompts of `length`; it tells the end of
"reading" and of "writing"."""


@dataclass(frozen=True)
class Slices:
    """Times models of few layers in the place of a run's."""

    optimizer: OptimizerArguments
    run: RunArguments
    decode: Decode | None = None
    """None where nothing is sampled."""
    gathers: bool = True
    """Whether weights that ZeRO-3 shards are gathered to sample, all at once."""

    def seconds(self, model: PlannedModel, rows: Rows, prompts: Rows | None) -> Seconds:
        """Seconds by phase of the whole model: forward_backward, optimizer and forward of a micro-batch of
        `rows`, and of `prompts` reading and, for each token that follows, writing."""
        number = model.config.num_hidden_layers
        counts = (FEW, MORE) if number > MORE else (number,)
        with redirect_stdout(StringIO()):  # what engines say of themselves
            found = [self._of_slice(model, layers, rows, prompts) for layers in counts]
        if len(found) == 1:
            return found[0]
        few, more = found
        added = {name: max(more[name] - few[name], 0.0) / (MORE - FEW) for name in few}
        return {name: few[name] + (number - FEW) * added[name] for name in few}

    def _of_slice(self, model: PlannedModel, layers: int, rows: Rows, prompts: Rows | None) -> Seconds:
        engine = self._engine(model, layers)
        seconds = _fastest(lambda end_of: self._read(engine, rows, end_of))
        if model.spec.trained:
            seconds |= _fastest(lambda end_of: self._step(engine, rows, end_of))
        decode = self.decode
        if prompts is not None and decode is not None:
            is_sharded = model.spec.zero_stage == 3 and self.gathers
            with weights_gathered_for_generation(engine) if is_sharded else nullcontext():
                seconds |= _fastest(lambda end_of: decode(engine.module, prompts, end_of))
            seconds["writing"] /= prompts.outputs
        engine.destroy()
        return seconds

    def _engine(self, model: PlannedModel, layers: int) -> DeepSpeedEngine:
        """An engine that the ranks of data share; what other ranks would share is whole."""
        settings = replace(model.settings, tensor_parallel_size=1, load_in_4bit=False)
        run = replace(self.run, zero_hpz_partition_size=1)
        config = train_config(settings, self.optimizer, run, per_device_batch_size=1)
        return build_trained_engine(
            _random_model(model, layers), settings, self.optimizer, run, config=config, num_training_steps=1
        )

    def _step(self, engine: DeepSpeedEngine, rows: Rows, end_of: Callable[[str], None]) -> None:
        train_step(engine, [_batch(rows)], lambda batch: {"loss": _loss(engine, batch)}, end_of=end_of)

    @torch.no_grad()
    def _read(self, engine: DeepSpeedEngine, rows: Rows, end_of: Callable[[str], None]) -> None:
        engine.eval()
        _loss(engine, _batch(rows).to(engine.device))
        end_of("forward")


def _fastest(run: Callable[[Callable[[str], None]], None]) -> Seconds:
    """The least seconds of each phase of `run`, which tells the end of each."""
    times, rounds = StepTimes(), []
    for number in range(WARM_UP + ROUNDS):
        times.take()
        run(times.end_of)
        if number >= WARM_UP:
            rounds.append(times.take())
    return {name: min(round[name] for round in rounds) for name in rounds[0]}


def _random_model(model: PlannedModel, layers: int) -> nn.Module:
    """The model with so many layers and numbers of no meaning in its weights, on the device."""
    config = with_layers(model.config, layers)
    set_attention(config, model.settings.attn_implementation)
    is_reward_model = model.spec.head != "language_model"
    found = meta_model_of(config, is_reward_model=is_reward_model, dtype=DTYPES[model.spec.dtype])
    found = found.to_empty(device=current_device())
    for tensor in (*found.parameters(), *found.buffers()):
        if tensor.is_floating_point():
            nn.init.normal_(tensor, std=0.02)
        else:
            tensor.zero_()
    return found


def _batch(rows: Rows) -> TokenBatch:
    ids = torch.ones(rows.rows, rows.length, dtype=torch.long)
    labels = torch.ones(rows.rows, rows.outputs, dtype=torch.bool)
    return TokenBatch.of(ids, labels, attention_mask=torch.ones_like(ids))


def _loss(engine: Any, batch: TokenBatch) -> Tensor:
    """A scalar whose gradient reaches every output."""
    if hasattr(engine.module, "v_head"):
        values: Tensor = engine(batch.input_ids, batch.attention_mask, return_values=True)
        return values.float().mean()
    return token_logprobs_of(engine, batch).mean()


def key_of(
    model: PlannedModel, rows: Rows, prompts: Rows | None, run: RunArguments, *, ranks: int
) -> Mapping[str, Any]:
    """What the seconds of a model depend on, besides the machine; `ranks` are those of data."""
    return {
        "ranks": ranks,
        "model": model.structure.key,
        "mode": model.mode,
        "zero_stage": model.spec.zero_stage,
        "attention": model.settings.attn_implementation,
        "rows": vars(rows),
        "prompts": prompts and vars(prompts),
        "offload": [run.offload, str(run.offload_nvme_path)],
        "torch_compile": run.torch_compile,
    }
