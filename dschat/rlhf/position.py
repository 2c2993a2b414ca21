"""Where a run of PPO stands."""

from dataclasses import dataclass


@dataclass
class Position:
    """Where PPO stands: the numbers that a checkpoint keeps."""

    ppo_step: int = 0
    """Rollout batches made so far."""
    minibatches_done: int = 0
    """Of the present PPO step; those that an early stop skips are among them."""
    updates_done: int = 0
    """Of those, the optimiser steps begun."""
    has_moved_enough: bool = False
    """Whether --target_approx_kl has ended the update."""
    num_skipped: int = 0
    """Steps of actor or critic in this PPO step that were not finite."""
    nonfinite_scores: int = 0
    """Of this rollout batch."""
    num_text_steps: int = 0
    """Optimiser steps of the run that had texts."""

    def begin_ppo_step(self) -> None:
        """Nothing is learned yet of the next rollout batch."""
        self.minibatches_done = self.updates_done = self.num_skipped = self.nonfinite_scores = 0
        self.has_moved_enough = False
