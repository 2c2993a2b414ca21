"""Where a run of PPO stands."""

from dataclasses import dataclass


@dataclass
class Position:
    """The numbers that say how far PPO is; a checkpoint keeps them."""

    ppo_step: int = 0
    """Rollout batches made so far."""
    minibatches_done: int = 0
    """Minibatches of the present PPO step that are through; those that an early stop skips count."""
    updates_done: int = 0
    """Optimiser steps of the present PPO step that were taken, skipped ones included."""
    has_moved_enough: bool = False
    """Whether --target_approx_kl has ended the present PPO step."""
    num_skipped: int = 0
    """Optimiser steps of actor or critic in the present PPO step that were not finite."""
    nonfinite_scores: int = 0
    """Scores of the present rollout batch that were not finite."""
    num_text_steps: int = 0
    """Optimiser steps of the run that had texts."""

    def begin_ppo_step(self, ppo_step: int) -> None:
        """Nothing is learned yet of the rollout batch with this number, counted from 0."""
        self.ppo_step = ppo_step + 1
        self.minibatches_done = self.updates_done = self.num_skipped = self.nonfinite_scores = 0
        self.has_moved_enough = False

    def is_inside(self, updates_per_ppo_step: int) -> bool:
        """Whether a rollout batch is still to be learned from."""
        return self.ppo_step > 0 and self.minibatches_done < updates_per_ppo_step

    def num_ppo_steps_done(self, updates_per_ppo_step: int) -> int:
        """PPO steps of the run that are learned from to their end."""
        return self.ppo_step - self.is_inside(updates_per_ppo_step)

    def num_updates(self, updates_per_ppo_step: int) -> int:
        """Optimiser steps of the run so far, skipped ones included: the number of a checkpoint."""
        inside = self.minibatches_done if self.is_inside(updates_per_ppo_step) else 0
        return self.num_ppo_steps_done(updates_per_ppo_step) * updates_per_ppo_step + inside
