"""DeepSpeed-Chat's import path of the reward model."""

from dschat.models.reward_model import RewardModel

__all__ = ["RewardModel"]
