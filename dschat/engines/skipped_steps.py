"""Optimiser steps skipped because something was not finite: counted, told of, and too many end the run."""

from collections import Counter
from typing import Any

from dschat.arguments import RunArguments
from dschat.console import messages
from dschat.engines.step import DeepSpeedEngine, skipped_because
from dschat.errors import UserError
from dschat.runs.output_folder import newest_checkpoint


class SkippedSteps:
    """What a run has skipped. Every rank skips the same steps, so each comes to the same decision."""

    def __init__(self, run: RunArguments) -> None:
        self._run = run
        self._in_a_row: Counter[str] = Counter()
        self._total = 0

    def note(self, engine: DeepSpeedEngine, *, step: int, model: str = "model") -> int:
        """Count the engine's last optimiser step: 1 where it was skipped, else 0.

        It is said of the first, the second, the fourth, the eighth ... Raises `UserError` after more than
        --max_skipped_steps in a row.
        """
        reason = skipped_because(engine)
        if reason is None:
            self._in_a_row[model] = 0
            return 0
        self._total += 1
        self._in_a_row[model] += 1
        if self._total & (self._total - 1) == 0:
            messages.warning(
                f"step {step}: the {reason} of the {model} is not finite, and the update was "
                f"skipped ({self._total} so far)."
            )
        if 0 < self._run.max_skipped_steps < self._in_a_row[model]:
            raise UserError(self._stop_message(step, model, reason))
        return 1

    def state_dict(self) -> dict[str, Any]:
        """What has been counted, for JSON."""
        return {"in_a_row": self._in_a_row, "total": self._total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from there."""
        self._in_a_row, self._total = Counter(state["in_a_row"]), state["total"]

    def _stop_message(self, step: int, model: str, reason: str) -> str:
        checkpoint = newest_checkpoint(self._run)
        kept = (
            f"The last good checkpoint is {checkpoint}: go on from it with --resume_from_checkpoint latest"
            if checkpoint
            else "No checkpoint was made: --save_interval makes some"
        )
        remedy = "another --dtype (bf16 or fp32)" if self._run.dtype == "fp16" else "--dtype fp32"
        return (
            f"step {step}: the {reason} of the {model} was not finite in {self._in_a_row[model]} optimiser "
            f"steps in a row, more than --max_skipped_steps {self._run.max_skipped_steps}. {kept}. What "
            f"usually helps: a lower learning rate or a longer --num_warmup_steps, a smaller "
            f"--max_grad_norm, {remedy}, or a look at the rows (dschat inspect)."
        )
