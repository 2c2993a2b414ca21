"""The forward pass over the micro-batch that a PPO step learns from first: it serves analysis and update.

No weight changes between the two, so an update that passed the rows again would compute the same numbers. The
graph of this one micro-batch is kept instead. Others are passed twice, as their graphs would have to be held
beside it: with one optimiser step in a pass and one micro-batch in it there are no others. The actor's graph
takes no more memory than its update does; the critic's is held beside it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class FirstPass:
    """Outputs of actor and critic with gradient, from the analysis that makes them to the update."""

    def __init__(self, *, keeps_critic: bool = True) -> None:
        self.keeps_actor = False
        """Whether the actor learns from the rollout batch that is analysed."""
        self.keeps_critic = keeps_critic
        """Whether the critic's graph is kept too."""
        self._of_actor: tuple[Tensor, Tensor] | None = None
        self._of_critic: Tensor | None = None

    def begin(self, *, keeps_actor: bool) -> None:
        """Before an analysis: what an earlier one kept is dropped."""
        self.keeps_actor = keeps_actor
        self._of_actor = self._of_critic = None

    def keep(self, logprobs: Tensor, entropy: Tensor, values: Tensor | None) -> None:
        """Hold the outputs [B, T] of those that learn, and with them the activations they were made of."""
        self._of_actor = (logprobs, entropy) if self.keeps_actor else None
        self._of_critic = values if self.keeps_critic else None

    def take_actor(self) -> tuple[Tensor, Tensor] | None:
        """Log-probabilities and entropy [B, T], once; None where none are kept, as after a restart."""
        outputs, self._of_actor = self._of_actor, None
        return outputs

    def take_critic(self) -> Tensor | None:
        """Values [B, T], once; None where none are kept."""
        outputs, self._of_critic = self._of_critic, None
        return outputs


@contextmanager
def pass_over(engine: Any, *, keeps_graph: bool) -> Iterator[None]:
    """In the block an engine passes over rows as in training, or without a graph as in evaluation."""
    if keeps_graph:
        engine.train()
    with torch.set_grad_enabled(keeps_graph):
        yield
