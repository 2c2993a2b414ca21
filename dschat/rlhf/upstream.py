"""The models that step 3 receives, and the promises that come with them."""

from dataclasses import dataclass

from dschat.arguments import RlhfArguments
from dschat.export.upstream import UpstreamModel, verify_model
from dschat.models.tokenizer import RlhfTokenizers
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine

GUARD_FLAG = "--guard_reward_model_name_or_path"


@dataclass(frozen=True)
class RlhfHandovers:
    """Where actor (and reference), critic and reward model come from; the last two are often one."""

    actor: UpstreamModel
    critic: (
        UpstreamModel | None
    )  # None where advantages are estimated without one, or it starts from the actor
    reward: UpstreamModel | None  # None where other sources alone score
    guard_reward: UpstreamModel | None  # the second reward model

    @property
    def all(self) -> list[UpstreamModel]:
        """Each model once."""
        given = (self.actor, self.critic, self.reward, self.guard_reward)
        return list({model.flag: model for model in given if model}.values())

    def check_templates(self, tokenizers: RlhfTokenizers) -> None:
        """Raise `UserError` where a model would read another template than it was trained with."""
        self.actor.check_template(tokenizers.actor)
        if self.critic and not tokenizers.fresh_critic:
            self.critic.check_template(tokenizers.actor)
        if self.reward:
            self.reward.check_template(tokenizers.reader or tokenizers.actor)
        if self.guard_reward:
            self.guard_reward.check_template(tokenizers.guard_reader or tokenizers.actor)

    def check_outputs(self, engine: DeepSpeedRLHFEngine) -> None:
        """Raise `UserError` where a model does not compute what was promised. Every rank must call it."""
        self.actor.check_outputs(engine.actor, *([engine.ref] if engine.ref else []))
        if self.critic and not engine.fresh_critic:
            self.critic.check_outputs(engine.critic)
        if self.reward:
            self.reward.check_outputs(engine.reward)
        if self.guard_reward:
            self.guard_reward.check_outputs(engine.guard_reward)


def verify_models(args: RlhfArguments) -> RlhfHandovers:
    """Actor, critic and reward models, verified as far as files tell. Raises `UserError`."""
    actor = verify_model(args.actor.model_name_or_path, "--actor_model_name_or_path", "language_model")
    reward = verify_model(args.reward_path, args.reward_flag, "score") if args.reward_path else None
    path = args.critic.model_name_or_path if args.ppo.has_critic else None
    critic = reward if path else None
    if path and path != args.reward_path:
        # Beside a reward model of its own, a critic that PPO has trained before can go on.
        critic = verify_model(path, "--critic_model_name_or_path", "score", "value")
    path = args.guard.guard_reward_model_name_or_path
    guard_reward = verify_model(path, GUARD_FLAG, "score") if path else None
    for model in filter(None, (reward, guard_reward)):
        model.warn_of_verdict()
    return RlhfHandovers(actor, critic, reward, guard_reward)
