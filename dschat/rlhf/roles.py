"""The models of step 3: one list of specifications, made from the flags in one place.

The checks of received folders, the tokenizers, the engines, the exports and the memory report loop over that
list. Adding a model is one more entry in `engine_specs`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from dschat.arguments import ModelArguments, RlhfArguments
from dschat.export.manifest import Head
from dschat.planning.models import Spec

TokenizerRule = Literal["actor", "reward", "own", "own tokens", "known"]
"""Which tokenizer a model may have.

- "actor": the actor's tokens; others are an error.
- "own": its own tokenizer and chat template.
- "own tokens": its own tokenizer, or the actor's tokenizer together with the actor's template.
- "known": the actor's tokenizer and template, or the reward model's.
- "reward": those of the reward model that a critic starts from. Where the reward model reads text in its own
  tokens, the critic starts from the actor.
"""

CRITIC_FLAG, REWARD_FLAG = "--critic_model_name_or_path", "--reward_model_name_or_path"

LOADABLE_HEADS: dict[Head, tuple[Head, ...]] = {
    "language_model": ("language_model",),
    "score": ("score",),
    "value": ("score", "value"),
}
"""Heads of a folder from which an engine with that head can be loaded: a critic starts from a reward model,
or from a critic that PPO has trained before."""


@dataclass(frozen=True, kw_only=True)
class EngineSpec(Spec):
    """One model of step 3."""

    flag: str
    """Flag that names the path."""
    shares_folder_of: str | None = None
    """Role of another model whose folder the path is, None where the folder is the model's own."""
    head: Head
    fresh_head: bool = False
    """Whether the output layer is drawn at random, as the folder has another one."""
    offload_flag: str | None = None
    """Flag that asks for `offload`, None where no flag does."""
    hybrid_engine: dict[str, Any] | None = None
    """DeepSpeed's settings of a Hybrid Engine, None for an engine that is none."""
    without_kernels: str = ""
    """Why a Hybrid Engine is not to generate with DeepSpeed's kernels, where the flags tell."""
    tokenizer: TokenizerRule = "actor"
    """Which tokenizer the model may have."""

    @property
    def source(self) -> str:
        """Role whose folder the weights are read from."""
        return self.shares_folder_of or self.role

    @property
    def starting_settings(self) -> ModelArguments:
        """`settings` with the path that the weights are read from."""
        return replace(self.settings, model_name_or_path=self.path)

    def starting_from(self, other: "EngineSpec") -> "EngineSpec":
        """The same model, started from the weights of `other` with a fresh head."""
        return replace(
            self,
            path=other.path,
            flag=other.flag,
            shares_folder_of=other.source,
            fresh_head=True,
            tokenizer=other.tokenizer,
        )


def engine_specs(args: RlhfArguments) -> list[EngineSpec]:
    """The models that the flags ask for, in the order in which their engines are built."""
    critic_path, reward_path = args.critic.model_name_or_path, args.rlhf.reward_model_name_or_path
    trained = partial(
        EngineSpec,
        trained=True,
        dtype=args.run.dtype,
        offload=args.run.offload,
        offload_flag="--offload",
    )
    reward_model = partial(
        EngineSpec,
        head="score",
        settings=args.critic,
        dtype=args.run.dtype,
        offload=args.rlhf.offload_reward_model,
        offload_flag="--offload_reward_model",
    )
    actor = trained(
        role="actor",
        name="actor",
        path=args.actor.model_name_or_path,
        flag="--actor_model_name_or_path",
        head="language_model",
        settings=args.actor,
        hybrid_engine=args.hybrid_engine,
        without_kernels=args.without_kernels,
        load_in_4bit=args.actor.load_in_4bit,
    )
    reference = replace(
        actor,
        role="reference",
        name="reference model",
        shares_folder_of="actor",
        trained=False,
        hybrid_engine=None,
        offload=args.rlhf.offload_reference_model,
        offload_flag="--offload_reference_model",
        without_adapters_of="actor",
    )
    critic = trained(
        role="critic",
        name="critic",
        path=critic_path or "",  # a model without a path is left out below
        flag=CRITIC_FLAG,
        shares_folder_of="reward" if reward_path in (None, critic_path) else None,
        head="value",
        settings=args.critic,
        load_in_4bit=args.critic.load_in_4bit,
        tokenizer="actor" if reward_path else "reward",
    )
    reward = reward_model(
        role="reward",
        name="reward model",
        path=reward_path or critic_path or "",
        flag=REWARD_FLAG if reward_path else CRITIC_FLAG,
        tokenizer="own" if reward_path else "own tokens",
    )
    guard = reward_model(
        role="guard",
        name="second reward model",
        path=args.guard.guard_reward_model_name_or_path or "",
        flag="--guard_reward_model_name_or_path",
        tokenizer="known",
    )
    critics = [critic if critic_path else critic.starting_from(actor)] if args.ppo.has_critic else []
    return [spec for spec in (actor, reference, *critics, reward, guard) if spec.path]


def unused_offloads(specs: Iterable[EngineSpec]) -> list[str]:
    """Flags not given that would move the weights of frozen models to CPU memory."""
    frozen = [spec for spec in specs if not spec.trained and not spec.offload]
    return list(dict.fromkeys(spec.offload_flag for spec in frozen if spec.offload_flag))


def spec_of(specs: Iterable[EngineSpec], role: str) -> EngineSpec | None:
    """The specification of a role, None where the run has no such model."""
    return next((spec for spec in specs if spec.role == role), None)
