"""The operations that a PPO step needs, over all ranks."""

from dschat.arguments import PpoArguments
from dschat.engines.model_work import ModelWork, Rows
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.rlhf.rollout.batch import RolloutBatch

SCORING = ("reference", "reward")
"""Models that read each answer once, beside the actor and the critic."""


class PpoWork:
    """Counts generation, experience and training of one PPO step, as `ModelWork` counts a pass."""

    def __init__(self, engine: DeepSpeedRLHFEngine, ppo: PpoArguments) -> None:
        self._ppo = ppo
        self._models = {role: ModelWork.of(one.module) for role, one in engine.by_role.items()}
        self._models.setdefault("reference", self._models["actor"])  # the actor without its adapters

    def flops(self, rollout: RolloutBatch, *, ppo_step: int, share_of_updates: float) -> float:
        """The operations of PPO step `ppo_step`, from 0, in which so much of the updates was made.

        Every token is sampled or read by the actor in a forward pass. A pass that serves both analysis and
        update is counted in both. The reward model is counted as if it had the actor's tokens.
        """
        lengths = rollout.attention_mask.sum(dim=1).float()
        rows = Rows(
            tokens=lengths.sum().item(),
            squares=lengths.square().sum().item(),
            labels=rollout.answer_mask.sum().item(),
        )
        actor, critic = self._models["actor"], self._models.get("critic")
        read_by = [actor, actor, critic, *(self._models.get(role) for role in SCORING)]
        reading = sum(model.forward(rows) for model in read_by if model)
        learns = [critic, actor if ppo_step >= self._ppo.critic_warmup_steps else None]
        learning = sum(model.training(rows) for model in learns if model)
        return reading + self._ppo.ppo_epochs * share_of_updates * learning
