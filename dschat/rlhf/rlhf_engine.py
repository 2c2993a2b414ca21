"""The four models of PPO, each in its DeepSpeed engine, and the actor's moving average."""

import contextlib
from collections.abc import Iterator

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dschat.arguments import ModelArguments, RlhfArguments
from dschat.console import messages
from dschat.distributed.deepspeed_private import whole_size
from dschat.engines.build import build_frozen_engine, build_trained_engine, frozen_config, train_config
from dschat.engines.out_of_memory import phase
from dschat.engines.step import DeepSpeedEngine
from dschat.errors import UserError
from dschat.models.loading import create_critic_model, create_hf_model
from dschat.models.lora import adapters_off, trains_adapters_only
from dschat.models.tokenizer import RlhfTokenizers
from dschat.rlhf.ema import MovingAverage

TRAINED_BYTES = 16
"""A trained weight's memory without activations: fp32 weight, gradient and two moments; or in bf16 and fp16 a
weight and a gradient of 2 bytes, and in fp32 a copy of the weight and two moments."""


def training_steps_of_actor(args: RlhfArguments, num_training_steps: int) -> int:
    """Optimiser steps without those in which the critic learns alone, so that the actor's schedule ends too.

    Raises `UserError` where none is left.
    """
    warmup = args.ppo.critic_warmup_steps
    steps = num_training_steps - warmup * args.updates_per_ppo_step
    if warmup and steps <= 0:
        raise UserError(
            f"--critic_warmup_steps {warmup} leaves the actor nothing to learn in: the run has "
            f"{num_training_steps // args.updates_per_ppo_step} PPO steps. Lower it, or give more prompts or "
            "--num_train_epochs."
        )
    return steps


class DeepSpeedRLHFEngine:
    """`actor` and `critic` are trained, `ref` and `reward`, the models they started from, are frozen.

    Every trained model has its own optimiser, schedule and ZeRO stage. A frozen one is sharded (stage 3) when
    the model it was copied from is, and whole on each rank otherwise. `ref` is None where the actor trains
    adapters alone: without them it is the reference, see `reference()`. `ema` is None unless asked for, and
    `critic` where advantages are estimated without one, `reward` where other sources alone score.
    `guard_reward` is the second reward model, where one is given.
    `fresh_critic` says whether the critic started from the actor instead of the reward model.
    """

    def __init__(self, args: RlhfArguments, tokenizers: RlhfTokenizers, *, num_training_steps: int) -> None:
        actor_training_steps = training_steps_of_actor(args, num_training_steps)
        self._args = args
        self._tokenizers = tokenizers
        self._tokenizer = tokenizers.actor
        self.fresh_critic = tokenizers.fresh_critic
        self.actor = self._build_actor(actor_training_steps)
        self.ref = self._build_reference()
        self.ema = MovingAverage(self.actor.module, decay=args.ppo.ema_decay) if args.ppo.enable_ema else None
        self.critic = self._build_critic(num_training_steps) if args.ppo.has_critic else None
        self.reward = self._reward_engine("the reward model", args.reward_path, tokenizers.reader)
        guard = args.guard.guard_reward_model_name_or_path
        self.guard_reward = self._reward_engine("the second reward model", guard, tokenizers.guard_reader)
        if self.critic is None:
            self._say_what_no_critic_saves()

    @property
    def trained(self) -> list[DeepSpeedEngine]:
        """The actor and, where there is one, the critic."""
        return [self.actor] if self.critic is None else [self.actor, self.critic]

    @property
    def by_name(self) -> dict[str, DeepSpeedEngine]:
        """The trained engines by the names that they have in checkpoints."""
        return {"actor": self.actor} | ({"critic": self.critic} if self.critic else {})

    def _say_what_no_critic_saves(self) -> None:
        likely, name = (self.reward, "reward model") if self.reward else (self.actor, "actor")
        num_weights = sum(whole_size(p) for p in likely.module.parameters())
        size = num_weights * TRAINED_BYTES / 2**30
        messages.info(
            f"no critic: --advantage_estimator {self._args.ppo.advantage_estimator} needs none. One as large "
            f"as the {name}, trained whole, would take {size:.3g} GiB for weights, gradients and "
            "Adam's states. The critic's own flags, such as its learning rate, have no use."
        )

    @contextlib.contextmanager
    def reference(self) -> Iterator[DeepSpeedEngine]:
        """The model that the actor started from: a copy, or within the block the actor without adapters."""
        if self.ref is not None:
            yield self.ref
            return
        with adapters_off(self.actor.module):
            yield self.actor

    def _train_config(self, model_args: ModelArguments) -> dict:
        return train_config(
            model_args,
            self._args.optimizer,
            self._args.run,
            per_device_batch_size=self._args.ppo.per_device_training_batch_size,
        )

    def _frozen_config(self, original: ModelArguments, *, offload: bool) -> dict:
        return frozen_config(stage=3 if original.zero_stage == 3 else 0, run=self._args.run, offload=offload)

    def _language_model(self, config: dict) -> PreTrainedModel:
        """The model that the actor starts from and the reference model stays."""
        args = self._args.actor
        return create_hf_model(
            AutoModelForCausalLM, args.model_name_or_path, self._tokenizer, config, **args.loading_options
        )

    def _trained_engine(
        self, model: nn.Module, args: ModelArguments, config: dict, num_training_steps: int
    ) -> DeepSpeedEngine:
        return build_trained_engine(
            model,
            args,
            self._args.optimizer,
            self._args.run,
            config=config,
            num_training_steps=num_training_steps,
        )

    @phase("loading the actor")
    def _build_actor(self, num_training_steps: int) -> DeepSpeedEngine:
        messages.info("loading the actor")
        args, config = self._args.actor, self._train_config(self._args.actor)
        model = self._language_model(config)
        return self._trained_engine(model, args, config, num_training_steps)

    @phase("loading the reference model")
    def _build_reference(self) -> DeepSpeedEngine | None:
        offload = self._args.rlhf.offload_reference_model
        if trains_adapters_only(self.actor.module):
            messages.info("the reference model is the actor without its adapters: no copy is loaded")
            if offload:
                messages.note("--offload_reference_model has nothing to offload and is ignored.")
            return None
        messages.info("loading the reference model, a copy: the actor trains more than adapters")
        config = self._frozen_config(self._args.actor, offload=offload)
        model = self._language_model(config)
        return build_frozen_engine(model, config=config)

    @phase("loading the critic")
    def _build_critic(self, num_training_steps: int) -> DeepSpeedEngine:
        messages.info("loading the critic")
        args, config = self._args.critic, self._train_config(self._args.critic)
        model = create_critic_model(
            self._args.actor.model_name_or_path if self.fresh_critic else args.model_name_or_path,
            self._tokenizer,
            config,
            rlhf_training=not self.fresh_critic,
            **args.loading_options,
        )
        return self._trained_engine(model, args, config, num_training_steps)

    @phase("loading the reward model")
    def _reward_engine(
        self, name: str, path: str | None, reader: PreTrainedTokenizerBase | None
    ) -> DeepSpeedEngine | None:
        """The reward model at `path`, if there is one."""
        if path is None:
            return None
        messages.info(f"loading {name}")
        args = self._args.critic
        config = self._frozen_config(args, offload=self._args.rlhf.offload_reward_model)
        model = create_critic_model(
            path,
            reader or self._tokenizer,
            config,
            rlhf_training=True,
            dropout=0.0,
        )
        return build_frozen_engine(model, config=config, role=name.removeprefix("the "))
