"""Experience of made-up rollouts, by the steps that `PPOTrainer.step` takes."""

from dschat.arguments import PpoArguments
from dschat.rlhf.experience import (
    AnalyzedRollout,
    AnswerAnalysis,
    Experience,
    MinibatchSampler,
    ScoreShaping,
    estimate_advantages,
    shape_rewards,
)
from dschat.rlhf.rollout.batch import RolloutBatch


def build_experience(
    rollout: RolloutBatch,
    analysis: AnswerAnalysis,
    args: PpoArguments,
    minibatch_sampler: MinibatchSampler,
    shaping: ScoreShaping,
    *,
    ppo_step: int,
    kl_coef: float | None = None,
) -> Experience:
    """Items 3, 4, 6 and 7 of docs/ppo.md; beta is that of the arguments unless given."""
    kl_coef = args.kl_coef if kl_coef is None else kl_coef
    scores = shaping(analysis.scores, rollout.ended)
    rewards = shape_rewards(scores, analysis, rollout.answer_mask, args, kl_coef=kl_coef)
    advantages, returns = estimate_advantages(rewards, analysis.values, rollout, args)
    begun = AnalyzedRollout(rollout, analysis, shaping, kl_coef=kl_coef, ppo_step=ppo_step)
    return Experience.of(begun, advantages, returns, args, minibatch_sampler)
