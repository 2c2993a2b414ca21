"""DeepSpeed's Hybrid Engine for the actor, and the trial that tells whether its kernels can generate.

The engine puts layers with CUDA kernels of its own in the place of the model's in eval mode. Those
were written for older versions of transformers: each run tries them on a small model of the actor's
architecture before the actor is loaded. Where they fail the engine is built without them.
"""

import contextlib
import copy
import gc
import io
import unittest.mock
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import deepspeed
import torch
import transformers
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.hybrid_engine import DeepSpeedHybridEngine
from deepspeed.utils import logger
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from dschat.distributed import deepspeed_private
from dschat.distributed.collectives import max_across_ranks
from dschat.distributed.device import current_device, device_type
from dschat.models.remote_code import loading_consent

TRIAL_LAYERS, TRIAL_PROMPT, TRIAL_ANSWER = 2, (2, 8), 2
TRIAL_TOLERANCE = 0.05
"""Error of the trial's logits, as a share of their spread: what rounding to bf16 makes is a tenth of it."""


@dataclass(frozen=True)
class Injection:
    """What a Hybrid Engine generates with."""

    config: dict[str, Any]
    """DeepSpeed's settings of the engine."""
    obstacle: str = ""
    """Why it has none of DeepSpeed's kernels, a clause; empty where it has."""
    layer: str = ""
    """Class of the layers that the kernels take the place of."""

    @property
    def gathers_by_layer(self) -> bool:
        """Whether ZeRO-3's weights are to be gathered a layer at a time in generation."""
        return not self.config["pin_parameters"]


def try_injection(config: PretrainedConfig, settings: dict[str, Any], dtype: torch.dtype) -> Injection:
    """Whether kernels can generate for models of this configuration, in a Hybrid Engine of these settings.

    A model of two layers with random weights answers two prompts, with the kernels and without. Every rank
    must call it. The random generators stand afterwards where they stood.
    """
    with keeping_random_state(), unittest.mock.patch.object(logger, "disabled", True):
        model = AutoModelForCausalLM.from_config(_smaller(config), dtype=dtype, **loading_consent())
        model.to(current_device()).eval()
        layer = _layer_name(model)
        obstacle = _obstacle(model, _trial_config(settings, dtype))
    has_obstacle = torch.tensor(float(bool(obstacle)), device=current_device())
    if max_across_ranks(has_obstacle, axis="world").item():
        missing, reason = obstacle or ("a trial of those for {} failed", "on another rank")
        shown = missing.format(f"{layer} of transformers {transformers.__version__}")
        return Injection(settings, shown + (f" ({reason})" if reason else ""))
    return Injection(settings, layer=layer)


def _obstacle(model: Any, config: dict[str, Any]) -> tuple[str, str] | None:
    """What is wrong with kernels for the layers, which {} stands for, and the reason if there is one."""
    prompts = torch.arange(16, device=current_device()).view(TRIAL_PROMPT)
    expected = _logits(model.requires_grad_(False), prompts)
    try:
        engine, *_ = deepspeed.initialize(model=model, config=config)
        if not deepspeed_private.injected_layers(engine):
            return "DeepSpeed has none for {}", ""
        with phase(engine):
            logits = _logits(engine.module, prompts)
    except Exception as error:  # whatever kernels end in that are not there, or that meet another layer
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")
        return "a trial of those for {} failed", reason
    difference = ((logits - expected).std() / expected.std()).item()
    if difference <= TRIAL_TOLERANCE:
        return None
    return "a trial of those for {} gave other answers", f"logits off by {difference:.2g} of their spread"


@contextlib.contextmanager
def building_hybrid(injection: Injection | None) -> Iterator[None]:
    """Around `deepspeed.initialize`: without kernels where the trial found obstacles.

    The engine broadcasts rank 0's generator state to all ranks; each goes on from its own.
    """
    if injection is None:
        yield
        return
    without = _without_kernels() if injection.obstacle else contextlib.nullcontext()
    with keeping_random_state(), without:
        yield


@contextlib.contextmanager
def generating(engine: DeepSpeedEngine, injection: Injection) -> Iterator[None]:
    """A generation phase of a Hybrid Engine."""
    with phase(engine):
        yield
    if injection.config["release_inference_cache"]:
        gc.collect()
        get_accelerator().empty_cache()


@contextlib.contextmanager
def phase(engine: Any) -> Iterator[None]:
    """From a Hybrid Engine's `eval()` to its `train()`: its kernels, if any, take layers' places."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints times of phases
        DeepSpeedHybridEngine.eval(engine)
    try:
        yield
    finally:
        DeepSpeedHybridEngine.train(engine)


def separate_phases(engine: Any, injection: Injection) -> None:
    """Have an engine's own `eval()` leave the layers alone, as passes over answers are made in it too."""
    engine.eval = partial(DeepSpeedEngine.eval, engine)
    engine.injection = injection


@contextlib.contextmanager
def _without_kernels() -> Iterator[None]:
    """Inside the block, Hybrid Engines are built without kernels."""

    def populate(engine: Any) -> None:
        engine.inference_policies = {}

    with unittest.mock.patch.object(DeepSpeedHybridEngine, "populate_all_inference_policies", populate):
        yield


def keeping_random_state() -> contextlib.AbstractContextManager[None]:
    """torch's generators, the device's among them, stand after the block where they stood before it."""
    devices = [] if device_type() == "cpu" else [current_device()]
    return torch.random.fork_rng(devices, device_type=device_type())


def _smaller(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration with two layers of the same width."""
    smaller = copy.deepcopy(config)
    smaller.num_hidden_layers = min(TRIAL_LAYERS, config.num_hidden_layers)
    if getattr(smaller, "layer_types", None):
        smaller.layer_types = smaller.layer_types[:TRIAL_LAYERS]
    return smaller


def _layer_name(model: torch.nn.Module) -> str:
    """The class of the model's blocks."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 0]
    return type(lists[0][0]).__name__ if lists else type(model).__name__


def _trial_config(settings: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    precision = {names[dtype]: {"enabled": True}} if dtype in names else {}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "hybrid_engine": {**settings, "inference_tp_size": 1},
    } | precision


def _logits(model: Any, prompts: Tensor) -> Tensor:
    """What a short generation draws its second tokens from: prompt and cache go into it. -> fp32 [2, V]."""
    answer = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=TRIAL_ANSWER,
        min_new_tokens=TRIAL_ANSWER,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return answer.logits[-1].float()
