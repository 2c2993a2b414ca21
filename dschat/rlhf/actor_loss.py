"""The loss of the actor on a micro-batch, item 8 of docs/ppo.md, with its other terms."""

from dataclasses import dataclass

from torch import Tensor

from dschat.arguments import PpoArguments
from dschat.losses import clipped_policy_loss, kl_loss, masked_mean
from dschat.rlhf.experience import MicroBatch


@dataclass(frozen=True)
class ActorLoss:
    """A micro-batch's share of an optimiser step's loss: shares are added over ranks and micro-batches."""

    total: Tensor
    """What is trained on. Scalar with gradient."""
    logprobs: Tensor
    """Of the actor as it is now, without gradient. [B, T]"""
    terms: dict[str, Tensor]
    """Terms of the total by the names of their metrics, before their coefficients."""


def actor_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    batch: MicroBatch,
    args: PpoArguments,
    *,
    kl_coef: float,
    num_tokens: int,
) -> ActorLoss:
    """The terms that `args` asks for, each a sum over tokens divided by `num_tokens`.

    `logprobs` and `entropy` [B, T] are the actor's as it is now, the latter needed with an `entropy_coef`.
    `num_tokens` counts the answer tokens of the whole optimiser step, so no gradient depends on how the rows
    are divided, on their order or on padding.
    """
    mask = batch.rollout.answer_mask
    terms = {
        "policy_loss": clipped_policy_loss(
            logprobs,
            batch.logprobs,
            batch.advantages,
            mask,
            ratio_clip=args.ratio_clip,
            ratio_clip_high=args.ratio_clip_high,
            dual_clip=args.dual_clip,
            weights=batch.weights,
            denominator=num_tokens,
        )
    }
    total = terms["policy_loss"]
    if args.has_kl_loss:
        terms["kl_loss"] = kl_loss(
            logprobs, batch.ref_logprobs, mask, kind=args.penalised_kl, denominator=num_tokens
        )
        total = total + kl_coef * terms["kl_loss"]
    if args.entropy_coef > 0:
        assert entropy is not None
        total = total - args.entropy_coef * masked_mean(entropy, mask, denominator=num_tokens)
    return ActorLoss(total, logprobs.detach(), terms)
