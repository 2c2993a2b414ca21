"""Sees that a reward model learns nothing from its pairs, and says what usually is the cause."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dschat.console import messages
from dschat.data.preparation import SplitData
from dschat.data.token_budget import SEQUENCES
from dschat.reports.reward_model import USEFUL
from dschat.reports.statistics import Z
from dschat.supervised.settings import SupervisedSettings

NUM_STEPS = 200
"""Optimiser steps over which the accuracy is looked at; twice as many and so on where they do not tell."""
LN_2 = math.log(2)
FEW_CUT = 0.02
"""A share of pairs at the length limit that explains nothing."""


class ChanceWatch:
    """Takes in optimiser steps, and compares the accuracy of every `NUM_STEPS` with chance until it warns.

    Numbers in, a message out: the metrics are alike on all ranks.
    """

    def __init__(self, settings: SupervisedSettings, data: SplitData, *, is_on: bool) -> None:
        self._data = data
        self._max_seq_len, self._learning_rate = settings.batch.max_seq_len, settings.model.learning_rate
        self._accuracies: list[float] = []
        self._losses: list[float] = []
        self._is_done = not is_on

    def take_in(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the metrics of an optimiser step, and warn where a window of steps is at chance."""
        if self._is_done:
            return
        self._accuracies.append(metrics["accuracy"])
        self._losses.append(metrics["loss"])
        number = len(self._accuracies)
        if number % NUM_STEPS:
            return
        accuracy, loss = float(np.mean(self._accuracies)), float(np.mean(self._losses))
        error = float(np.std(self._accuracies, ddof=1)) / math.sqrt(number)
        if accuracy - Z * error > 0.5:  # something was learned
            self._accuracies, self._losses = [], []
        elif accuracy + Z * error < USEFUL:  # else there are too few pairs to say, and more are taken in
            self._is_done = True
            messages.warning(
                f"step {step}: the reward model ranks its training pairs as chance does: accuracy "
                f"{accuracy:.3f} +- {error:.3f}, loss {loss:.4f} over the last {number} optimiser steps "
                f"(chance: 0.5 and {LN_2:.4f}). {self._causes(accuracy, error, loss)}"
            )

    def _causes(self, accuracy: float, error: float, loss: float) -> str:
        """What may be behind it, the most likely first, with the numbers of this run."""
        chosen, rejected = (self._data.train.lengths(name) for name in SEQUENCES[1:])
        cut = float(np.mean(np.maximum(chosen, rejected) >= self._max_seq_len))
        longer = float(np.mean(np.sign(chosen - rejected) + 1) / 2)
        noise = "labels that are noise or the wrong way round: read some pairs (dschat inspect)"
        slow = (
            f"a learning rate too low for the new head: --learning_rate {self._learning_rate:g}, or "
            "--num_warmup_steps too long"
        )
        limit = (
            f"answers that --max_seq_len {self._max_seq_len} cuts: {cut:.0%} of the training pairs reach it, "
            "and what tells the answers apart may be gone"
        )
        length = (
            "answers that differ in nothing but length: the chosen one is the longer one in "
            f"{longer:.0%} of the pairs"
        )
        moves = loss > LN_2 + 0.01  # scores differ, to no avail; else they hardly differ at all
        causes = [noise, slow] if moves else [slow, noise]
        causes = [limit, *causes] if cut > FEW_CUT else [*causes, limit]
        return f"What usually is the cause: {'; '.join([*causes, length])}."

    def state_dict(self) -> dict[str, Any]:
        """The steps taken in, for JSON."""
        return {"accuracies": self._accuracies, "losses": self._losses, "is_done": self._is_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._accuracies, self._losses = list(state["accuracies"]), list(state["losses"])
        self._is_done = state["is_done"]
