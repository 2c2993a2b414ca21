"""The models of PPO, each in its DeepSpeed engine, and the actor's moving average."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from dschat.arguments import OptimizerArguments, PpoArguments, RunArguments
from dschat.console import messages
from dschat.distributed.deepspeed_private import whole_size
from dschat.distributed.device import DTYPES
from dschat.distributed.mesh import mesh
from dschat.engines.at_rest import in_use
from dschat.engines.build import build_frozen_engine, build_trained_engine, frozen_config, train_config
from dschat.engines.hybrid import Injection, try_injection
from dschat.engines.memory_remedies import PhaseKind
from dschat.engines.out_of_memory import phase, report_models_with
from dschat.engines.step import DeepSpeedEngine
from dschat.errors import UserError
from dschat.models.attention import choose_attention
from dschat.models.config import read_config
from dschat.models.loading import create_critic_model, create_hf_model
from dschat.models.lora import adapters_off, trains_adapters_only
from dschat.models.products import choose_products
from dschat.models.reward_model import RewardModel
from dschat.rlhf.ema import MovingAverage
from dschat.rlhf.roles import EngineSpec, unused_offloads
from dschat.rlhf.tokenizers import RlhfTokenizers
from dschat.runs.measured_choices import MeasuredChoices

TRAINED_BYTES = 16
"""Memory of a trained weight without activations: fp32 weight, gradient and two moments; or in bf16 and fp16
a weight and a gradient of 2 bytes, and in fp32 a copy of the weight and two moments."""


def choose_ways(specs: Sequence[EngineSpec], *, longest: int, choices: MeasuredChoices) -> None:
    """Time ways to compute the models' attention and products; `longest` is the longest row in tokens.

    Every rank must call it. Raises `UserError` for an --attn_implementation that cannot be had.
    """
    for dtype in dict.fromkeys(spec.dtype for spec in specs):
        models = [(spec.path, spec.settings) for spec in specs if spec.dtype == dtype]
        choose_attention(models, dtype=dtype, longest=longest, choices=choices)
        choose_products(dtype, choices)


def num_training_steps(ppo: PpoArguments, *, num_ppo_steps: int, updates_per_ppo_step: int) -> dict[str, int]:
    """Optimiser steps of the actor and the critic, over which their learning rates are scheduled.

    The steps in which the critic learns alone are none of the actor's, so that the actor's schedule ends too.
    Raises `UserError` where none is left for the actor.
    """
    warmup = ppo.critic_warmup_steps
    if warmup and num_ppo_steps <= warmup:
        raise UserError(
            f"--critic_warmup_steps {warmup} leaves the actor nothing to learn in: the run has "
            f"{num_ppo_steps} PPO steps. Lower it, or give more prompts or --num_train_epochs."
        )
    return {
        "actor": (num_ppo_steps - warmup) * updates_per_ppo_step,
        "critic": num_ppo_steps * updates_per_ppo_step,
    }


class DeepSpeedRLHFEngine:
    """The engines of the models in `specs`, by role.

    `actor` and `critic` are trained; `ref`, `reward` and `guard_reward` (the second reward model) are frozen.
    All but the actor may be None: `ref` where the actor trains adapters alone (see `reference()`), `critic`
    where advantages are estimated without one, `reward` where other sources alone score. `ema` is the moving
    average of the actor, None unless it is asked for.
    """

    def __init__(
        self,
        specs: Sequence[EngineSpec],
        tokenizers: RlhfTokenizers,
        *,
        optimizer: OptimizerArguments,
        ppo: PpoArguments,
        run: RunArguments,
        num_training_steps: Mapping[str, int],
    ) -> None:
        self.specs = specs
        self._tokenizers, self._optimizer, self._ppo, self._run = tokenizers, optimizer, ppo, run
        self.by_role: dict[str, DeepSpeedEngine] = {}
        report_models_with({spec.name: spec.settings for spec in specs}, unused_offloads(specs))
        for spec in specs:
            with phase(PhaseKind.LOADING, spec.name):
                if spec.trained:
                    self.by_role[spec.role] = self._build_trained(spec, num_training_steps[spec.role])
                elif not self._is_adapterless_twin(spec):
                    self.by_role[spec.role] = self._build_frozen(spec)
        self.actor = self.by_role["actor"]
        self.ref = self.by_role.get("reference")
        self.critic = self.by_role.get("critic")
        self.reward = self.by_role.get("reward")
        self.guard_reward = self.by_role.get("guard")
        self.ema = MovingAverage(self.actor.module, decay=ppo.ema_decay) if ppo.enable_ema else None
        if self.critic is None:
            self._say_what_no_critic_saves()

    @property
    def trained(self) -> list[DeepSpeedEngine]:
        """The actor and, where there is one, the critic."""
        return list(self.by_name.values())

    @property
    def by_name(self) -> dict[str, DeepSpeedEngine]:
        """The trained engines by the names that they have in checkpoints."""
        return {spec.role: self.by_role[spec.role] for spec in self.specs if spec.trained}

    def _say_what_no_critic_saves(self) -> None:
        likely, name = (self.reward, "reward model") if self.reward else (self.actor, "actor")
        num_weights = sum(whole_size(p) for p in likely.module.parameters())
        size = num_weights * TRAINED_BYTES / 2**30
        messages.info(
            f"no critic: --advantage_estimator {self._ppo.advantage_estimator} needs none. One as large "
            f"as the {name}, trained whole, would take {size:.3g} GiB for weights, gradients and "
            "Adam's states. The critic's own flags, such as its learning rate, have no use."
        )

    @contextlib.contextmanager
    def reference(self) -> Iterator[DeepSpeedEngine]:
        """The model that the actor started from: a copy, or within the block the actor without adapters."""
        if self.ref is not None:
            with in_use(self.ref) as reference:
                yield reference
            return
        with adapters_off(self.actor.module):
            yield self.actor

    def _is_adapterless_twin(self, spec: EngineSpec) -> bool:
        """Whether another model computes the same with its adapters off, so that no copy is needed."""
        twin = spec.without_adapters_of
        if twin is None or not trains_adapters_only(self.by_role[twin].module):
            return False
        messages.info(f"the {spec.name} is the {twin} without its adapters: no copy is loaded")
        if spec.offload:
            messages.note(f"{spec.offload_flag} has nothing to offload and is ignored.")
        return True

    def _build_trained(self, spec: EngineSpec, num_training_steps: int) -> DeepSpeedEngine:
        messages.info(f"loading the {spec.name}")
        config = train_config(
            spec.settings,
            self._optimizer,
            self._run,
            per_device_batch_size=self._ppo.per_device_training_batch_size,
        )
        injection = self._injection(spec)
        return build_trained_engine(
            self._load(spec, config),
            spec.settings,
            self._optimizer,
            self._run,
            config=config,
            num_training_steps=num_training_steps,
            injection=injection,
        )

    def _injection(self, spec: EngineSpec) -> Injection | None:
        """What the model generates with where it is a Hybrid Engine, tried before it is loaded."""
        settings = spec.hybrid_engine
        if settings is None:
            return None
        ranks, size = mesh().world.size, settings["inference_tp_size"]
        if ranks % size:
            raise UserError(f"--inference_tp_size {size} must divide the number of ranks, {ranks}.")
        if spec.without_kernels:
            return Injection(settings, spec.without_kernels)
        return try_injection(read_config(spec.path, 0.0), settings, DTYPES[spec.dtype])

    def _build_frozen(self, spec: EngineSpec) -> DeepSpeedEngine:
        twin = spec.without_adapters_of
        why = f", a copy: the {twin} trains more than adapters" if twin else ""
        messages.info(f"loading the {spec.name}{why}")
        config = frozen_config(spec.settings, self._run, offload=spec.offload)
        model = self._load(spec, config)
        return build_frozen_engine(model, self._run, config=config, role=spec.name, offload=spec.offload)

    def _load(self, spec: EngineSpec, config: dict[str, Any]) -> PreTrainedModel | RewardModel:
        tokenizer = self._tokenizers.of(spec.role)
        options: dict[str, Any] = {
            "dropout": 0.0,
            "load_in_4bit": spec.load_in_4bit,
            "attn_implementation": spec.settings.attn_implementation,
        }
        if spec.head == "language_model":
            return create_hf_model(AutoModelForCausalLM, spec.path, tokenizer, config, **options)
        return create_critic_model(spec.path, tokenizer, config, rlhf_training=not spec.fresh_head, **options)
