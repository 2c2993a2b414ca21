"""Each step's object: the groups that it is composed of, and the checks across them."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

from dschat.arguments.checks import (
    check_4bit,
    check_engines,
    check_lora,
    check_tensor_sizes,
    note_padding_flag,
    note_truncated_sampling,
)
from dschat.arguments.data import DataArguments, InspectOptions, TokenizerArguments
from dschat.arguments.flags import group, require
from dschat.arguments.forecast import ForecastArguments
from dschat.arguments.guard import GuardArguments
from dschat.arguments.hybrid import HybridArguments
from dschat.arguments.model import ModelArguments, OptimizerArguments
from dschat.arguments.parallel import ParallelArguments
from dschat.arguments.pass_sizes import PassSizes
from dschat.arguments.ppo import PpoArguments, TextArguments
from dschat.arguments.record import RunDescription, groups_of, settings_of
from dschat.arguments.rewards import REWARD_MODEL, RewardSourceArguments
from dschat.arguments.rlhf import RlhfOptions
from dschat.arguments.rollout import ROLLOUT_TOLERANCES, RolloutArguments
from dschat.arguments.run import RunArguments
from dschat.arguments.supervised import BatchArguments, DpoOptions, RewardOptions, SftOptions
from dschat.arguments.widths import WidthArguments
from dschat.console import messages


class TrainingStep:
    """What the objects of all steps that train have in common. Their groups are the steps' own fields."""

    step: ClassVar[str]
    """The name of the step in files and in `parse_arguments`."""
    data: DataArguments
    optimizer: OptimizerArguments
    run: RunArguments
    __dataclass_fields__: ClassVar[dict[str, "dataclasses.Field[Any]"]]

    @property
    def batch_sizes(self) -> dict[str, int]:
        """Rows that one rank contributes to a batch, by the product of flags that sets them."""
        raise NotImplementedError

    @property
    def pass_sizes(self) -> PassSizes:
        """The batches of one rank, as far as flags tell."""
        raise NotImplementedError

    @property
    def micro_batch(self) -> tuple[int, int]:
        """Rows (or pairs) that a rank trains on at once, and how many such parts an optimiser step has."""
        group = getattr(self, "ppo", None) or getattr(self, "batch")  # noqa: B009
        rows: int = getattr(group, self.pass_sizes.train_rows_flag)
        return rows, self.optimizer.gradient_accumulation_steps

    def with_flags(self, changes: Mapping[str, Any]) -> Self:
        """The same arguments with other values of these flags. Raises `UserError` where they do not fit."""
        groups = {}
        for part in dataclasses.fields(self):
            prefix, known = part.metadata["prefix"], dataclasses.fields(part.metadata["group"])
            mine = {f.name: changes[prefix + f.name] for f in known if prefix + f.name in changes}
            groups[part.name] = dataclasses.replace(getattr(self, part.name), **mine)
        return dataclasses.replace(self, **groups)

    @property
    def parallel_sizes(self) -> dict[str, int]:
        """Ranks that share a model, by the axis of the mesh; those that are not named have one."""
        return {}

    @cached_property
    def description(self) -> RunDescription:
        """The run that these arguments ask for, in the terms that all steps share."""
        return RunDescription(
            step=self.step,
            run=self.run,
            data=self.data,
            settings=settings_of(self),
            batch_sizes=self.batch_sizes,
            groups=groups_of(self),
        )


class SupervisedStep(TrainingStep):
    """What steps 1 and 2 and DPO have in common beyond that."""

    model: ModelArguments
    batch: BatchArguments
    optimizer: OptimizerArguments
    parallel: ParallelArguments

    @property
    def parallel_sizes(self) -> dict[str, int]:
        """Ranks that share the model, by the axis of the mesh."""
        return {"tensor": self.model.tensor_parallel_size, **self.parallel.sizes}

    @property
    def batch_sizes(self) -> dict[str, int]:
        """Rows (step 2 and DPO: pairs) that one rank contributes to an optimiser step."""
        rows = self.batch.per_device_train_batch_size * self.optimizer.gradient_accumulation_steps
        return {"--per_device_train_batch_size x --gradient_accumulation_steps": rows}

    @property
    def pass_sizes(self) -> PassSizes:
        """The batches of one rank, as far as flags tell; a pair is two rows."""
        batch, in_pair = self.batch, 1 if self.step == "sft" else 2
        rows = in_pair * batch.per_device_train_batch_size
        if batch.max_tokens_per_batch:
            rows = max(in_pair, batch.max_tokens_per_batch // batch.max_seq_len)
        return PassSizes(
            train_rows=rows,
            train_rows_flag="per_device_train_batch_size",
            accumulation=self.optimizer.gradient_accumulation_steps,
            length=batch.max_seq_len,
            eval_rows=in_pair * batch.per_device_eval_batch_size,
        )

    def __post_init__(self) -> None:
        check_engines(self.run, self.model)
        check_lora(self.optimizer.only_optimize_lora, self.model)
        check_4bit(self.run, self.optimizer.only_optimize_lora, self.model)
        self.parallel.check(self.model, self.run, self.parallel_sizes)


@dataclass(frozen=True, kw_only=True)
class SftArguments(SupervisedStep):
    """Step 1."""

    step = "sft"

    data: DataArguments = group(DataArguments)
    tokenizer: TokenizerArguments = group(TokenizerArguments)
    model: ModelArguments = group(ModelArguments)
    batch: BatchArguments = group(BatchArguments)
    widths: WidthArguments = group(WidthArguments)
    optimizer: OptimizerArguments = group(OptimizerArguments)
    parallel: ParallelArguments = group(ParallelArguments)
    sft: SftOptions = group(SftOptions)
    run: RunArguments = group(RunArguments)


@dataclass(frozen=True, kw_only=True)
class RewardArguments(SupervisedStep):
    """Step 2."""

    step = "reward"

    data: DataArguments = group(DataArguments)
    tokenizer: TokenizerArguments = group(TokenizerArguments)
    model: ModelArguments = group(ModelArguments, learning_rate=9e-6)
    batch: BatchArguments = group(BatchArguments, export_model="best")
    widths: WidthArguments = group(WidthArguments)
    optimizer: OptimizerArguments = group(OptimizerArguments)
    parallel: ParallelArguments = group(ParallelArguments)
    reward: RewardOptions = group(RewardOptions)
    run: RunArguments = group(RunArguments)

    def __post_init__(self) -> None:
        super().__post_init__()
        note_padding_flag(self.reward.num_padding_at_beginning)


@dataclass(frozen=True, kw_only=True)
class DpoArguments(SupervisedStep):
    """DPO on the pairs of step 2, in place of steps 2 and 3."""

    step = "dpo"

    data: DataArguments = group(DataArguments)
    tokenizer: TokenizerArguments = group(TokenizerArguments)
    model: ModelArguments = group(ModelArguments, learning_rate=5e-7, lora_learning_rate=5e-6)
    batch: BatchArguments = group(BatchArguments)
    widths: WidthArguments = group(WidthArguments)
    optimizer: OptimizerArguments = group(OptimizerArguments)
    parallel: ParallelArguments = group(ParallelArguments)
    dpo: DpoOptions = group(DpoOptions)
    run: RunArguments = group(RunArguments)


@dataclass(frozen=True, kw_only=True)
class RlhfArguments(TrainingStep):
    """Step 3."""

    step = "rlhf"

    data: DataArguments = group(DataArguments)
    tokenizer: TokenizerArguments = group(TokenizerArguments)
    actor: ModelArguments = group(ModelArguments, "actor_", learning_rate=1e-6)
    critic: ModelArguments = group(ModelArguments, "critic_", learning_rate=9e-6, model_name_or_path=None)
    optimizer: OptimizerArguments = group(OptimizerArguments, num_warmup_steps=100, adam_epsilon=1e-5)
    rollout: RolloutArguments = group(RolloutArguments)
    hybrid: HybridArguments = group(HybridArguments)
    ppo: PpoArguments = group(PpoArguments)
    widths: WidthArguments = group(WidthArguments)
    text: TextArguments = group(TextArguments)
    guard: GuardArguments = group(GuardArguments)
    rewards: RewardSourceArguments = group(RewardSourceArguments)
    forecast: ForecastArguments = group(ForecastArguments)
    rlhf: RlhfOptions = group(RlhfOptions)
    run: RunArguments = group(RunArguments)

    @property
    def batch_sizes(self) -> dict[str, int]:
        """Answers that one rank samples in a PPO step, and that it contributes to an optimiser step."""
        return {
            "--per_device_generation_batch_size x --generation_batches": self.rollout_size,
            "--per_device_training_batch_size x --gradient_accumulation_steps": self.minibatch_size,
        }

    @property
    def parallel_sizes(self) -> dict[str, int]:
        """Ranks that share a model, by the axis of the mesh; each model has as many or one."""
        return {"tensor": max(self.actor.tensor_parallel_size, self.critic.tensor_parallel_size)}

    @property
    def pass_sizes(self) -> PassSizes:
        """The batches of one rank, as far as flags tell."""
        return PassSizes(
            train_rows=self.ppo.per_device_training_batch_size,
            train_rows_flag="per_device_training_batch_size",
            accumulation=self.optimizer.gradient_accumulation_steps,
            length=self.rollout.max_prompt_seq_len + self.rollout.max_answer_seq_len,
            answer_length=self.rollout.max_answer_seq_len,
            generation_rows=self.rollout.per_device_generation_batch_size,
            rollout_rows=self.rollout_size,
            gather="never" if self.hybrid.unpin_actor_parameters else self.rollout.rollout_gather,
            passes=self.ppo.ppo_epochs,
            keeps_average=self.ppo.enable_ema,
            holds_both=self.rlhf.reuse_first_pass == "both" and self.ppo.has_critic,
        )

    @property
    def rollout_size(self) -> int:
        """Answers a rank samples before each training phase."""
        return self.rollout.per_device_generation_batch_size * self.rollout.generation_batches

    @property
    def rollout_tolerance(self) -> float:
        """The mean difference in nats that passes the rollout check, 0 without one.

        The defaults are a few times what rounding makes of deep models. A temperature below 1 enlarges it.
        """
        if self.rollout.rollout_tolerance is not None:
            return self.rollout.rollout_tolerance
        return ROLLOUT_TOLERANCES[self.run.dtype] / min(1, self.rollout.temperature)

    @property
    def records_rollout_logprobs(self) -> bool:
        """Whether anything needs the log-probabilities with which tokens were sampled."""
        return self.rollout_tolerance > 0 or self.ppo.rollout_correction != "none"

    @property
    def aligns_overflow(self) -> bool:
        """Whether actor and critic skip optimiser steps together."""
        return self.rlhf.align_overflow and self.run.dtype == "fp16" and self.ppo.has_critic

    @property
    def hybrid_engine(self) -> dict[str, Any] | None:
        """DeepSpeed's settings of the actor's Hybrid Engine, None where it is to be none."""
        if not self.hybrid.enable_hybrid_engine:
            return None
        longest = self.rollout.max_prompt_seq_len + self.rollout.max_answer_seq_len
        return {**self.hybrid.config, "max_out_tokens": longest}

    @property
    def without_kernels(self) -> str:
        """Why the flags leave no room for the Hybrid Engine's kernels; empty where they do."""
        if self.rollout.rollout_backend in ("static", "continuous"):
            return f"--rollout_backend {self.rollout.rollout_backend} was given"
        if self.actor.load_in_4bit:
            return "they read no weights in 4 bits"
        if self.actor.tensor_parallel_size > 1:
            return "tensor ranks share the layers"
        return "they read no adapters of PEFT" if self.actor.uses_lora else ""

    @property
    def reward_path(self) -> str | None:
        """Where the reward model is, None where other sources alone score."""
        return self.rlhf.reward_model_name_or_path or self.critic.model_name_or_path

    @property
    def model_paths(self) -> list[str]:
        """Every model that a flag names, whether the run needs it or not."""
        named = [
            getattr(getattr(self, part.name), field.name)
            for part in dataclasses.fields(self)
            for field in dataclasses.fields(part.metadata["group"])
            if field.name.endswith("model_name_or_path")
        ]
        return [path for path in named if path]

    @property
    def reward_weights(self) -> dict[str, float]:
        """The weight of every source of scores, by name."""
        names = [*([REWARD_MODEL] if self.reward_path else []), *self.rewards.names]
        return {**dict.fromkeys(names, 1.0), **self.rewards.given_weights}

    def _check_scores(self) -> None:
        has_model = self.reward_path is not None
        require(
            has_model or self.rewards.has_sources,
            "nothing scores the answers: give the reward model of step 2 with --critic_model_name_or_path, "
            "a Python function with --reward_function FILE.py:NAME, or --reward_endpoint URL.",
        )
        known = [*([REWARD_MODEL] if has_model else []), *self.rewards.names]
        unknown = [name for name in self.rewards.given_weights if name not in known]
        require(
            not unknown,
            f"--reward_weights: no source of scores is called {', '.join(unknown)}; there are "
            f"{', '.join(known)}.",
        )
        require(
            has_model or self.ppo.score_scale != "step2",
            "--score_normalization step2 (--normalize_scores) is for the scores of a reward model, and there "
            "is none; use running, or leave it out.",
        )

    @property
    def minibatch_size(self) -> int:
        """Answers a rank contributes to each optimiser step."""
        return self.ppo.per_device_training_batch_size * self.optimizer.gradient_accumulation_steps

    @property
    def _fitting_batches(self) -> int:
        """The least --generation_batches whose answers fill whole optimiser steps."""
        size = self.rollout.per_device_generation_batch_size
        return math.lcm(size, self.minibatch_size) // size

    @property
    def updates_per_ppo_step(self) -> int:
        """Optimiser steps that learn from one rollout batch."""
        return self.ppo.ppo_epochs * (self.rollout_size // self.minibatch_size)

    def __post_init__(self) -> None:
        self._check_scores()
        trained = (self.actor, self.critic) if self.ppo.has_critic else (self.actor,)
        check_engines(self.run, *trained)
        check_lora(self.optimizer.only_optimize_lora, *trained)
        check_4bit(self.run, self.optimizer.only_optimize_lora, *trained)
        require(
            not self.ppo.compares_answers or self.rollout.num_samples_per_prompt > 1,
            f"--advantage_estimator {self.ppo.advantage_estimator} compares the answers to one prompt and "
            f"needs --num_samples_per_prompt above 1, got {self.rollout.num_samples_per_prompt}; 4 is usual.",
        )
        check_tensor_sizes(self.actor, self.critic, self.rollout)
        note_padding_flag(self.rlhf.num_padding_at_beginning)
        if self.rlhf.align_overflow and not self.aligns_overflow:
            messages.note("--align_overflow is ignored: only --dtype fp16 overflows, and it takes a critic.")
        note_truncated_sampling(self.rollout)
        self.hybrid.check(self.actor, self.rollout)
        for model in (self.actor, self.critic):
            require(
                model.dropout == 0 and model.lora_dropout == 0,
                f"--{model.prefix}dropout and --{model.prefix}lora_dropout must be 0: PPO compares the "
                "probabilities of one set of weights, and dropout would change them from pass to pass.",
            )
        require(
            self.rollout_size % self.minibatch_size == 0,
            f"a rank samples {self.rollout_size} answers (--per_device_generation_batch_size times "
            f"--generation_batches) but an optimiser step takes {self.minibatch_size} "
            "(--per_device_training_batch_size times --gradient_accumulation_steps): the first must be a "
            f"multiple of the second; --generation_batches {self._fitting_batches} is the least.",
        )
        require(
            not self.rlhf.enable_test_mode or self.rlhf.test_stop_step > 0,
            "--enable_test_mode needs --test_stop_step, the number of PPO steps to run.",
        )


@dataclass(frozen=True, kw_only=True)
class InspectArguments:
    """scripts/inspect_data.py."""

    data: DataArguments = group(DataArguments)
    tokenizer: TokenizerArguments = group(TokenizerArguments)
    inspect: InspectOptions = group(InspectOptions)


StepArguments = SftArguments | RewardArguments | DpoArguments | RlhfArguments
SupervisedArguments = SftArguments | RewardArguments | DpoArguments

STEPS: dict[str, type] = {
    "sft": SftArguments,
    "reward": RewardArguments,
    "dpo": DpoArguments,
    "rlhf": RlhfArguments,
    "inspect": InspectArguments,
}
"""The objects by the names that `parse_arguments` takes."""
