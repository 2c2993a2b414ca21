"""What PPO learns from: a rollout batch of all ranks, with the analysis of its answers by the four models.

Column t of every [B, T] tensor belongs to the decision to emit answer token t, whose logits and value a model
gives one position before the token (`dschat.data.token_batch`).

Every rank holds all rows: a few MB of numbers, while the models' forward passes are what the ranks share. So
advantages, whitening, permutations and statistics are the same on any number of ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dschat.arguments import OptimizerArguments, PpoArguments, RunArguments
from dschat.data.packing import PADDED, RowLayout
from dschat.data.token_batch import TokenBatch
from dschat.distributed.mesh import mesh
from dschat.losses import (
    advantages_and_returns,
    discounted_returns,
    group_advantages,
    kl_estimate,
    kl_shaped_rewards,
    masked_mean,
    masked_whiten,
    truncated_importance_weights,
)
from dschat.rlhf.rollout.agreement import Difference
from dschat.rlhf.rollout.batch import RolloutBatch


@dataclass(frozen=True)
class ScoreShaping:
    """From the reward model's raw scores to those that are learned from."""

    clip: float
    missing_eos_penalty: float
    mean: float = 0.0
    std: float = 1.0

    def normalised(self, scores: Tensor) -> Tensor:
        """Scores in units of the evaluation data's spread, where step 2's statistics are used. [B] -> [B]."""
        return (scores - self.mean) / self.std

    def is_clipped(self, scores: Tensor) -> Tensor:
        """Whether the clip changes a raw score. [B] -> bool [B]."""
        return (self.normalised(scores).abs() > self.clip) & (self.clip > 0)

    def __call__(self, scores: Tensor, ended: Tensor) -> Tensor:
        """Normalised, clipped, and less the penalty where an answer has no end token. [B], bool [B] -> [B].

        The penalty comes after the clip, which would otherwise swallow it where it matters most.
        """
        scores = self.normalised(scores)
        if self.clip > 0:
            scores = scores.clamp(-self.clip, self.clip)
        return torch.where(ended, scores, scores - self.missing_eos_penalty)


@dataclass(frozen=True)
class MinibatchSampler:
    """Which rows meet in which optimiser step, in which micro-batch, on which rank."""

    micro_batch_size: int
    accumulation_steps: int
    world_size: int
    rank: int
    seed: int
    layout: RowLayout = PADDED
    """How a micro-batch is laid out in the rows that models read."""

    def optimizer_steps(self, lengths: Tensor, *, ppo_step: int, epoch: int) -> list[Tensor]:
        """Row numbers of each optimiser step over all ranks: a fresh permutation a pass, alike on each rank.

        `lengths` [B] in tokens. Inside a step rows are sorted by length, so that those passed through a model
        together, and by different ranks at one time, are of similar length.
        """
        step_size = self.micro_batch_size * self.accumulation_steps * self.world_size
        assert len(lengths) % step_size == 0, (
            f"{len(lengths)} rows do not fill optimiser steps of {step_size}"
        )
        generator = np.random.default_rng([self.seed % 2**64, ppo_step, epoch])
        permutation = torch.from_numpy(generator.permutation(len(lengths)))
        return [rows[lengths[rows].argsort(stable=True)] for rows in permutation.split(step_size)]

    def micro_batches(self, step_rows: Tensor) -> list[Tensor]:
        """This rank's rows of an optimiser step, a tensor a micro-batch."""
        parts = step_rows.split(self.micro_batch_size * self.world_size)
        return [part[self.rank :: self.world_size] for part in parts]

    def rows_of_first_pass(self, rollout: RolloutBatch, ppo_step: int) -> list[Tensor]:
        """This rank's row numbers in the micro-batches in which pass 0 will meet them."""
        lengths = rollout.attention_mask.sum(dim=1).cpu()
        steps = self.optimizer_steps(lengths, ppo_step=ppo_step, epoch=0)
        return [part for step_rows in steps for part in self.micro_batches(step_rows)]


def build_minibatch_sampler(
    ppo: PpoArguments, optimizer: OptimizerArguments, run: RunArguments, layout: RowLayout
) -> MinibatchSampler:
    """The dealing of rows to this rank's optimiser steps and micro-batches that the flags ask for."""
    return MinibatchSampler(
        micro_batch_size=ppo.per_device_training_batch_size,
        accumulation_steps=optimizer.gradient_accumulation_steps,
        world_size=mesh().data.size,
        rank=mesh().data.rank,
        seed=run.seed,
        layout=layout,
    )


@dataclass(frozen=True)
class AnswerAnalysis:
    """What the models, and other sources of scores, say of the answers.

    [B, T], with anything beyond the answers, but `scores` and those by source [B].
    """

    logprobs: Tensor  # of the actor
    entropy: Tensor  # of the actor, nats
    ref_logprobs: Tensor  # of the reference model
    values: Tensor | None  # of the critic, where there is one
    scores: Tensor  # raw: of the reward model, or the sum over all sources
    by_source: dict[str, Tensor] = field(default_factory=dict)  # the parts of such a sum
    num_errors: dict[str, int] = field(default_factory=dict)  # answers that a source could not score

    def log_ratio(self, mask: Tensor) -> Tensor:
        """Of policy to reference, 0 outside the answers: the KL's k1 a token. bool [B, T] -> [B, T]."""
        return torch.where(mask, self.logprobs - self.ref_logprobs, 0)

    def with_finite_scores(self) -> tuple["AnswerAnalysis", int]:
        """The same with the mean of the finite scores in place of each that is not, and how many were not.

        So one answer whose score overflowed is about neutral, instead of making every advantage of the
        rollout batch not finite. Where no score is finite they stay, and no update will be taken.
        """
        scores, num_bad = finite_scores(self.scores)
        return replace(self, scores=scores), num_bad


def finite_scores(scores: Tensor) -> tuple[Tensor, int]:
    """The mean of the finite scores in place of each that is not, where one is, and how many were not. [B]"""
    is_bad = ~scores.isfinite()
    num_bad = int(is_bad.sum())
    if num_bad in (0, len(scores)):
        return scores, num_bad
    return torch.where(is_bad, scores[~is_bad].mean(), scores), num_bad


@dataclass(frozen=True)
class MicroBatch:
    """Rows that one rank passes through a model at once. [B, T] each."""

    rollout: RolloutBatch
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor | None
    advantages: Tensor
    returns: Tensor
    weights: Tensor | None = None
    """Of the tokens' policy losses, with --rollout_correction."""
    layout: RowLayout = PADDED
    """That of the rows that models read."""
    rows: Tensor | None = None
    """Their numbers in the rollout batch. [B]"""

    @cached_property
    def tokens(self) -> TokenBatch:
        """The rows for a forward pass, laid out as in the analysis; the answers are their labels."""
        return self.rollout.tokens.placed(self.layout)


@dataclass(frozen=True)
class Minibatch:
    """One rank's part of one optimiser step."""

    micro_batches: list[MicroBatch]
    num_tokens: int
    """Answer tokens of the whole optimiser step, over all micro-batches and ranks."""
    is_first: bool
    """Whether no weight has changed since the experience was made, so that every ratio is 1."""
    kl_coef: float
    """beta of this PPO step."""


@dataclass(frozen=True)
class AnalyzedRollout:
    """What a PPO step starts from: an analysed rollout batch of all ranks, and numbers that are steered."""

    rollout: RolloutBatch
    analysis: AnswerAnalysis
    shaping: ScoreShaping
    kl_coef: float
    """beta of this PPO step."""
    ppo_step: int
    """Counted from 0."""


@dataclass(frozen=True)
class Experience:
    """An analysed rollout batch of all ranks with what every pass over it learns from. All [B, T]."""

    rollout: RolloutBatch
    analysis: AnswerAnalysis
    raw_advantages: Tensor
    advantages: Tensor
    """Whitened over the rollout batch, unless told otherwise or made by comparison of answers."""
    returns: Tensor
    weights: Tensor | None
    """Of the tokens' policy losses, with --rollout_correction, and where they are truncated."""
    weight_cap: float
    minibatch_sampler: MinibatchSampler
    shaping: ScoreShaping
    kl_coef: float
    ppo_step: int

    @staticmethod
    def of(
        analyzed: AnalyzedRollout,
        advantages: Tensor,
        returns: Tensor,
        args: PpoArguments,
        minibatch_sampler: MinibatchSampler,
    ) -> "Experience":
        """The advantages whitened, item 7 of docs/ppo.md, and the tokens weighed. Both [B, T]."""
        rollout, analysis = analyzed.rollout, analyzed.analysis
        is_whitened = args.whiten_advantages and not args.compares_answers
        return Experience(
            rollout=rollout,
            analysis=analysis,
            raw_advantages=advantages,
            advantages=masked_whiten(advantages, rollout.answer_mask) if is_whitened else advantages,
            returns=returns,
            weights=rollout_weights(analysis.logprobs, rollout, args),
            weight_cap=args.tis_cap,
            minibatch_sampler=minibatch_sampler,
            shaping=analyzed.shaping,
            kl_coef=analyzed.kl_coef,
            ppo_step=analyzed.ppo_step,
        )

    @property
    def settings(self) -> dict[str, float]:
        """The numbers of the `AnalyzedRollout` that it was made of, for JSON."""
        shaping = {"mean": self.shaping.mean, "std": self.shaping.std}
        return {**shaping, "kl_coef": self.kl_coef, "ppo_step": self.ppo_step}

    def minibatches(self, epoch: int) -> Iterator[Minibatch]:
        """This rank's optimiser steps of one pass.

        In pass 0 rows meet in the micro-batches in which they were analysed, so that the ratio of the first
        optimiser step is exactly 1, not only nearly.
        """
        answer_lengths = self.rollout.answer_lengths.cpu()
        lengths = self.rollout.attention_mask.sum(dim=1).cpu()
        for number, rows in enumerate(
            self.minibatch_sampler.optimizer_steps(lengths, ppo_step=self.ppo_step, epoch=epoch)
        ):
            yield Minibatch(
                micro_batches=[
                    self._micro_batch(part) for part in self.minibatch_sampler.micro_batches(rows)
                ],
                num_tokens=int(answer_lengths[rows].sum()),
                is_first=epoch == 0 and number == 0,
                kl_coef=self.kl_coef,
            )

    def _micro_batch(self, rows: Tensor) -> MicroBatch:
        rows = rows.to(self.returns.device)
        rollout = self.rollout.rows(rows)
        width = rollout.answer_mask.shape[1]
        analysis = self.analysis
        return MicroBatch(
            rollout,
            logprobs=analysis.logprobs[rows, :width],
            ref_logprobs=analysis.ref_logprobs[rows, :width],
            values=None if analysis.values is None else analysis.values[rows, :width],
            advantages=self.advantages[rows, :width],
            returns=self.returns[rows, :width],
            weights=None if self.weights is None else self.weights[rows, :width],
            layout=self.minibatch_sampler.layout,
            rows=rows,
        )

    @property
    def kl(self) -> Tensor:
        """k1 to the reference in nats per answer, the mean over answers. Scalar."""
        return self.analysis.log_ratio(self.rollout.answer_mask).sum(dim=1).mean()

    def metrics(self) -> dict[str, float]:
        """What the rollout batch was like before anything was learned from it. Names as in docs/ppo.md."""
        mask, analysis = self.rollout.answer_mask, self.analysis
        log_ratio, kl = analysis.log_ratio(mask), self.kl
        k3 = kl_estimate(log_ratio, torch.zeros_like(log_ratio), "k3").sum(dim=1).mean()
        values = {
            "score": analysis.scores.mean(),
            "score_std": analysis.scores.std(unbiased=False),
            "score_clipped_share": self.shaping.is_clipped(analysis.scores).float().mean(),
            "kl": kl,
            "k3": k3,
            "score_minus_kl": analysis.scores.mean() - self.kl_coef * kl,
            "entropy": masked_mean(analysis.entropy, mask),
            "advantage_mean": masked_mean(self.raw_advantages, mask),
            "advantage_std": masked_variance(self.raw_advantages, mask).sqrt(),
            "return_mean": masked_mean(self.returns, mask),
            "return_std": masked_variance(self.returns, mask).sqrt(),
            "answer_length": self.rollout.answer_lengths.float().mean(),
            "eos_share": self.rollout.ended.float().mean(),
        }
        values |= {f"score_{name}": scores.mean() for name, scores in analysis.by_source.items()}
        if analysis.values is not None:
            unexplained = masked_variance(self.returns - analysis.values, mask)
            total = masked_variance(self.returns, mask).clamp(min=1e-8)
            values["explained_variance"] = 1 - unexplained / total
        if self.weights is not None:
            values["tis_weight_mean"] = masked_mean(self.weights, mask)
            values["tis_truncated_share"] = masked_mean((self.weights >= self.weight_cap).float(), mask)
        errors = {f"reward_errors_{name}": number for name, number in analysis.num_errors.items()}
        numbers = {name: value.item() for name, value in values.items()} | errors | {"kl_coef": self.kl_coef}
        if self.rollout.logprobs is None:
            return numbers
        apart = Difference.between(self.rollout, analysis.logprobs)
        return numbers | {"rollout_logprob_diff": apart.mean, "rollout_logprob_diff_max": apart.largest}


def shape_rewards(
    scores: Tensor, analysis: AnswerAnalysis, mask: Tensor, args: PpoArguments, *, kl_coef: float
) -> Tensor:
    """Rewards per token, item 4 of docs/ppo.md: shaped scores [B] at the end, less the KL penalty. -> [B, T].

    `kl_coef` is the present beta; the penalty is left out where it stands in the loss.
    """
    return kl_shaped_rewards(
        scores,
        analysis.logprobs,
        analysis.ref_logprobs,
        mask,
        kl_coef=0 if args.has_kl_loss else kl_coef,
        score_clip=0,
        kl_estimator=args.penalised_kl,
    )


def estimate_advantages(
    rewards: Tensor, values: Tensor | None, rollout: RolloutBatch, args: PpoArguments
) -> tuple[Tensor, Tensor]:
    """Advantages before whitening, and returns, by --advantage_estimator. [B, T] each -> two [B, T].

    All tokens of an answer share its advantage where answers to one prompt are compared, each by the sum of
    its rewards: the score, less the KL penalty unless that stands in the loss.
    """
    mask = rollout.answer_mask
    if args.has_critic:
        assert values is not None, "where there is a critic it has valued the answers"
        return advantages_and_returns(values, rewards, mask, gamma=args.gamma, gae_lambda=args.gae_lambda)
    returns = discounted_returns(rewards, mask, gamma=args.gamma)
    estimator = args.advantage_estimator
    if estimator not in ("rloo", "grpo"):
        return returns, returns
    of_answers = group_advantages(rewards.sum(dim=1), rollout.prompt_rows, estimator)
    return of_answers.unsqueeze(1) * mask, returns


def rollout_weights(logprobs: Tensor, rollout: RolloutBatch, args: PpoArguments) -> Tensor | None:
    """What each token's policy loss is multiplied by, with --rollout_correction. [B, T] -> [B, T]."""
    if args.rollout_correction == "none":
        return None
    assert rollout.logprobs is not None, "the rollout recorded no log-probabilities"
    return truncated_importance_weights(logprobs, rollout.logprobs, rollout.answer_mask, cap=args.tis_cap)


def masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    """The population variance of the valid entries. -> scalar."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)
