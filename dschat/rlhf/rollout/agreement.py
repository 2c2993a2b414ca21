"""Whether sampled tokens have the probabilities that the training model gives them."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dschat.arguments import ROLLOUT_TOLERANCES
from dschat.console import messages
from dschat.distributed.device import PRECISIONS
from dschat.errors import UserError
from dschat.rlhf.rollout.batch import RolloutBatch


def usual_tolerance(dtype: torch.dtype) -> float:
    """The mean difference, in nats per token, that rounding in a model's precision may make."""
    return ROLLOUT_TOLERANCES[PRECISIONS.get(dtype, "fp32")]


@dataclass(frozen=True)
class Difference:
    """How far log-probabilities lie apart, without sign, in nats per token."""

    mean: float
    largest: float
    num_tokens: int

    @staticmethod
    def between(rollout: RolloutBatch, logprobs: Tensor) -> "Difference":
        """Of those that the tokens were sampled with to the training model's [B, T]; NaN where either is."""
        assert rollout.logprobs is not None, "the rollout recorded no log-probabilities"
        apart = (logprobs - rollout.logprobs).abs()[rollout.answer_mask]
        return Difference(apart.mean().item(), apart.max().item(), len(apart))

    def __str__(self) -> str:
        return f"log-probabilities differ by mean {self.mean:.2g}, at most {self.largest:.2g}"


class RolloutCheck:
    """Compares answers with the training model: the first of a run, before anything is learned from them, and
    those of every evaluation.

    The mean decides: one token that a router of experts sent elsewhere is no fault, a wrong position or cache
    shifts them all. Ranks hold the same rollout batch, so all of them decide alike.
    """

    def __init__(
        self,
        tolerance: float,
        on_mismatch: Literal["stop", "uncached", "warn"],
        *,
        engine: str = "generate()",
        is_quiet: bool = False,
    ) -> None:
        """`tolerance` is in nats per token; `engine` is the back end's name in messages.

        One that is quiet says nothing where all is well.
        """
        self.difference: Difference | None = None
        """What the last comparison found."""
        self._tolerance, self._engine, self._is_quiet = tolerance, engine, is_quiet
        self._on_mismatch = on_mismatch

    @staticmethod
    def of(
        tolerance: float,
        on_mismatch: Literal["stop", "uncached", "warn"],
        *,
        engine: str,
        is_quiet: bool = False,
    ) -> "RolloutCheck | None":
        """The check that flags ask for: none where the tolerance is 0."""
        return RolloutCheck(tolerance, on_mismatch, engine=engine, is_quiet=is_quiet) if tolerance else None

    def wants_uncached(self, rollout: RolloutBatch, logprobs: Tensor) -> bool:
        """Say how far apart they are, and whether to answer again without a KV cache.

        Raises `UserError` beyond the tolerance where the run is to stop.
        """
        difference = self._compare(rollout, logprobs, self._engine)
        if difference.mean <= self._tolerance:  # False for NaN
            return False
        if self._on_mismatch == "stop":
            raise UserError(
                f"{self._disagreement(difference)} --rollout_on_mismatch uncached generates without the KV "
                "cache, slowly; --dtype fp32 tells a fault from rounding. For rounding raise "
                "--rollout_tolerance, and --rollout_correction tis weighs the tokens."
            )
        if self._on_mismatch == "warn":
            messages.info(
                f"warning: {self._disagreement(difference)} --rollout_on_mismatch warn: the run goes on."
            )
            return False
        messages.info(
            f"warning: {self._disagreement(difference)} --rollout_on_mismatch uncached: this run generates "
            "without the KV cache, slowly, and is checked again."
        )
        return True

    def require_agreement(self, rollout: RolloutBatch, logprobs: Tensor) -> None:
        """The same of answers without a KV cache. Raises `UserError` beyond the tolerance."""
        difference = self._compare(rollout, logprobs, f"{self._engine} without a KV cache")
        if not difference.mean <= self._tolerance:
            raise UserError(
                f"{self._disagreement(difference)} The KV cache is not to blame: there was none. "
                "--dtype fp32 tells a fault from rounding, --rollout_on_mismatch warn goes on all the same."
            )

    def _compare(self, rollout: RolloutBatch, logprobs: Tensor, engine: str) -> Difference:
        difference = self.difference = Difference.between(rollout, logprobs)
        if not self._is_quiet:
            messages.info(
                f"rollout check: {engine} against the training model over {difference.num_tokens} tokens: "
                f"{difference} (tolerance of the mean {self._tolerance:g})"
            )
        return difference

    def _disagreement(self, difference: Difference) -> str:
        return (
            f"{self._engine} and the training model disagree: {difference}, and --rollout_tolerance lets a "
            f"mean of {self._tolerance:g} pass."
        )
