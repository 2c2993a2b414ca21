"""The plan of a run: printed before its models are loaded, and at its end beside what was measured."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from dschat.arguments import TrainingStep
from dschat.console import messages
from dschat.distributed.collectives import max_across_ranks
from dschat.distributed.device import current_device, device_type, peak_memory_gib
from dschat.distributed.mesh import is_main_process
from dschat.engines.speed import SECONDS
from dschat.models.config import read_config
from dschat.planning.hardware import this_hardware
from dschat.planning.models import Spec
from dschat.planning.plan import GB, Plan, plan_of
from dschat.planning.rates import rates_of
from dschat.runs.atomic_folder import write_json
from dschat.runs.measured_choices import MeasuredChoices
from dschat.runs.output_folder import METRICS

PLAN = "plan.json"
"""The file of the plan in a run's folder."""


@dataclass(frozen=True)
class RunPlan:
    """What a run was expected to take. Every rank makes the same calls."""

    plan: Plan | None
    """None where the model's passes cannot be made without weights."""
    folder: Path | None
    baseline: float
    """Bytes of this process before models: the interpreter, libraries and data; 0 on a GPU."""

    @staticmethod
    def begin(
        args: TrainingStep,
        specs: Sequence[Spec],
        choices: MeasuredChoices,
        *,
        longest: int,
        steps: int,
    ) -> "RunPlan":
        """Print the plan and write it to plan.json in the run's folder.

        `longest` is the length of the longest row in tokens, `steps` how many optimiser steps (step 3: PPO
        steps) the run has. Nothing is measured: seconds are told where this machine was measured before, as
        `scripts/plan.py` does it.
        """
        folder = Path(args.run.output_dir) if args.run.output_dir and is_main_process() else None
        baseline = float(psutil.Process().memory_info().rss) if device_type() == "cpu" else 0.0
        hardware, sizes = this_hardware(), replace(args.pass_sizes, length=int(longest))
        config, tokens = read_config(specs[0].path, dropout=None), sizes.train_rows * sizes.length
        rates = rates_of(config, args.run.dtype, num_tokens=tokens, choices=choices, measures=False)
        try:
            with torch.random.fork_rng(devices=[]):
                plan = plan_of(args, specs, hardware, sizes=sizes, rates=rates, steps=steps)
        except Exception as error:  # the code of a family may do anything on the meta device
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            messages.note(f"no plan of memory and time: no pass without weights ({reason}).")
            return RunPlan(None, None, baseline)
        for line in plan.lines():
            messages.info(line)
        if plan.fits is False:
            messages.warning(
                "by the plan the run does not fit this machine; scripts/plan.py names flags that cut most."
            )
        if folder is not None:
            write_json(folder / PLAN, plan.as_json())
        return RunPlan(plan, folder, baseline)

    def finish(self) -> None:
        """Say how far the plan was from what was measured, in one line and in plan.json."""
        if self.plan is None:
            return
        own = max(peak_memory_gib() * 2**30 - self.baseline, 0.0)
        peak = max_across_ranks(torch.tensor(own, device=current_device()), axis="world").item()
        line = f"plan: peak {self.plan.peak / GB:.2f} GB predicted, {peak / GB:.2f} measured"
        measured: dict[str, Any] = {"device_peak": peak, "baseline": self.baseline}
        seconds = {} if self.folder is None else measured_seconds(self.folder)
        if seconds:
            measured["seconds"] = seconds
            if self.plan.seconds:
                each = sum(seconds.get(name, 0.0) for name in self.plan.seconds)
                line += f"; {self.plan.step_seconds:.3g} s a step predicted, {each:.3g} measured"
        messages.info(line)
        if self.folder is not None:
            write_json(self.folder / PLAN, {**self.plan.as_json(), "measured": measured})


def measured_seconds(folder: Path) -> dict[str, float]:
    """The mean seconds of a step by phase, from a run's metrics without the first step, which warms up."""
    found: list[dict[str, float]] = []
    with suppress(OSError, ValueError):
        for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            phases = {k.removeprefix(SECONDS): v for k, v in values.items() if k.startswith(SECONDS)}
            found += [phases] if phases else []
    kept = found[1:] or found
    return {name: sum(step.get(name) or 0.0 for step in kept) / len(kept) for name in (kept or [{}])[0]}
