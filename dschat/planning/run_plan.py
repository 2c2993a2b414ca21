"""The plan of a run: printed before its models are loaded, and at its end beside what was measured."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from dschat.arguments import TrainingStep
from dschat.console import messages
from dschat.distributed.collectives import max_across_ranks
from dschat.distributed.device import current_device, give_back_memory, peak_memory_gib
from dschat.distributed.mesh import is_main_process
from dschat.engines.speed import SECONDS
from dschat.planning.hardware import this_hardware
from dschat.planning.models import Spec
from dschat.planning.plan import GB, Plan, plan_of
from dschat.planning.savings import would_cut_most
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
        specs_of: Callable[[Any], Sequence[Spec]],
        choices: MeasuredChoices,
        *,
        longest: int,
        steps: int,
        mean_length: float | None = None,
    ) -> "RunPlan":
        """Print the plan and what would cut its memory most, and write it to plan.json.

        `specs_of` tells the models of arguments, `longest` is the length of the longest row in tokens,
        `mean_length` that of all rows, padding included, and `steps` how many optimiser steps (step 3: PPO
        steps) the run has. Nothing is measured: seconds are told where `scripts/plan.py` has measured this
        machine for these flags.
        """
        folder = Path(args.run.output_dir) if args.run.output_dir and is_main_process() else None
        hardware = this_hardware()
        baseline = resident_memory() if hardware.is_cpu else 0.0

        def planned(changed: TrainingStep, **options: Any) -> Plan:
            sizes = changed.pass_sizes
            fewer = args.pass_sizes.answer_length - sizes.answer_length
            sizes = replace(sizes, length=min(int(longest) - fewer, sizes.length))
            return plan_of(changed, specs_of(changed), hardware, sizes=sizes, **options)

        try:
            with torch.random.fork_rng(devices=[]):
                plan = planned(args, choices=choices, mean_length=mean_length, steps=steps)
                saving = would_cut_most(args, plan, planned, choices)
        except Exception as error:  # the code of a family may do anything on the meta device
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            messages.note(f"no plan of memory and time: no pass without weights ({reason}).")
            return RunPlan(None, None, baseline)
        for line in [*plan.lines(), *saving]:
            messages.info(line)
        if plan.fits is False:
            messages.warning("by the plan the run does not fit this machine.")
        if folder is not None:
            write_json(folder / PLAN, plan.as_json())
        return RunPlan(plan, folder, baseline)

    def finish(self) -> None:
        """Say how far the plan was from what was measured, in one line and in plan.json."""
        if self.plan is None:
            return
        own = max(peak_memory_gib() * 2**30 - self.baseline, 0.0)
        peak = max_across_ranks(torch.tensor(own, device=current_device()), axis="world").item()
        line = f"plan: peak {self.plan.reported_peak} GB predicted, {peak / GB:.2f} measured"
        measured: dict[str, Any] = {"device_peak": peak, "baseline": self.baseline}
        if self.plan.hardware.device == "cuda":
            free, all_of_it = torch.cuda.mem_get_info()
            measured["beside_tensors"] = all_of_it - free - torch.cuda.memory_reserved()
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


def resident_memory() -> float:
    """Bytes that this process holds, without what malloc keeps for later and the run would use first.

    What it held before, as to time ways to compute, is no part of `peak_memory_gib` from here on.
    """
    give_back_memory()
    with suppress(OSError):  # another system than Linux; 5 sets the peak to the present, says proc(5)
        Path("/proc/self/clear_refs").write_text("5")
    return float(psutil.Process().memory_info().rss)
