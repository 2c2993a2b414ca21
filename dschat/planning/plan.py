"""A plan: what a run will take of memory, time and money, before a model is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from transformers import PretrainedConfig

from dschat.arguments import PassSizes, TrainingStep
from dschat.planning.engine_memory import Moment, total
from dschat.planning.hardware import Hardware
from dschat.planning.memory import LIBRARIES, MemoryModel
from dschat.planning.models import Spec, planned_models
from dschat.planning.slices import Slices
from dschat.planning.timing import Timing
from dschat.runs.measured_choices import MeasuredChoices

GB = 1e9
OF_PASSES = ("activations", "logits", "heap")
"""Kinds of parts that malloc on a CPU may hold more than once, for rows of other widths."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The prediction for one run."""

    hardware: Hardware
    phases: dict[str, Moment]
    """The worst moment of each phase on the rank that holds most, rank 0."""
    seconds: dict[str, float] | None = None
    """Of an optimiser step, of step 3 of a PPO step, by phase; None where the device was not measured."""
    steps: int | None = None
    """Steps of the run; None where the data are not known."""

    def on_device(self, phase: str) -> float:
        """Bytes of a device in a phase; on a CPU with what is offloaded to the same memory."""
        moment = self.phases[phase]
        return total(moment) + (total(moment, on_host=True) if self.hardware.is_cpu else 0.0)

    @property
    def worst(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=self.on_device)

    @property
    def peak(self) -> float:
        """The most bytes that a device holds."""
        return self.on_device(self.worst)

    @property
    def reported_peak(self) -> str:
        """The peak in GB as messages have it: "at least" where it depends on how malloc fits passes together.

        That is on a CPU, where passes and what libraries take are more than half of it.
        """
        fitted = sum(part.bytes for part in self.phases[self.worst] if part.kind in OF_PASSES)
        is_least = self.hardware.is_cpu and fitted + LIBRARIES["cpu"] > self.peak / 2
        return f"{'at least ' * is_least}{self.peak / GB:.2f}"

    @property
    def host_peak(self) -> float:
        """The most bytes that one host holds for its ranks; whole copies are on rank 0 alone."""
        number = min(self.hardware.ranks, self.hardware.ranks_per_host)
        if self.hardware.is_cpu:
            return number * self.peak
        return max(number * total(moment, on_host=True) for moment in self.phases.values())

    @property
    def fits(self) -> bool | None:
        """Whether devices and hosts have room; None where neither is known."""
        hardware = self.hardware
        found = [
            needed <= there
            for needed, there in ((self.peak, hardware.usable), (self.host_peak, hardware.host_memory))
            if there
        ]
        return all(found) if found else None

    @property
    def step_seconds(self) -> float | None:
        """Seconds of a step."""
        return None if self.seconds is None else sum(self.seconds.values())

    @property
    def hours(self) -> float | None:
        """Hours of all steps, without evaluations and exports."""
        seconds = self.step_seconds
        return None if seconds is None or self.steps is None else self.steps * seconds / 3600

    def lines(self, *, price_per_hour: float = 0.0) -> list[str]:
        """The plan in a few lines. The price is that of one device."""
        hardware, worst = self.hardware, self.worst
        room = f" of {hardware.usable / GB:.1f}" if hardware.usable else ""
        others = ", ".join(f"{name} {self.on_device(name) / GB:.2f}" for name in self.phases if name != worst)
        found = [
            f"plan: {self.reported_peak}{room} GB on each of {hardware.ranks} x {hardware.device} to {worst} "
            f"({_parts(self.phases[worst])}); {others}",
        ]
        if not hardware.is_cpu and self.host_peak:
            found.append(f"plan: {self.host_peak / GB:.2f} GB in the memory of a host")
        if self.seconds is not None and (each := self.step_seconds):
            shares = ", ".join(f"{name} {value / each:.0%}" for name, value in self.seconds.items())
            steps = "" if self.hours is None else f", {self.hours:.3g} hours for {self.steps:,} steps"
            price = (self.hours or 0.0) * price_per_hour * hardware.ranks
            money = f", {price:,.2f} at {price_per_hour:g} per device and hour" if price else ""
            found.append(f"plan: {each:.3g} s a step{steps}{money} ({shares})")
        return found

    def as_json(self) -> dict[str, Any]:
        """The plan for plan.json: bytes and seconds."""
        return {
            "hardware": vars(self.hardware),
            "device_peak": self.peak,
            "host_peak": self.host_peak,
            "fits": self.fits,
            "phases": {
                name: {
                    "device": total(moment),
                    "host": total(moment, on_host=True),
                    "parts": [vars(part) for part in moment if part.bytes],
                }
                for name, moment in self.phases.items()
            },
            "seconds": self.seconds,
            "steps": self.steps,
            "hours": self.hours,
        }


def _parts(moment: Moment) -> str:
    """The parts of a moment by kind, the largest first."""
    sums: dict[str, float] = {}
    for part in moment:
        sums[part.kind] = sums.get(part.kind, 0.0) + part.bytes
    ordered = sorted(sums.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {size / GB:.2f}" for kind, size in ordered if size >= 0.01 * sum(sums.values()))


def plan_of(
    args: TrainingStep,
    specs: Sequence[Spec],
    hardware: Hardware,
    *,
    sizes: PassSizes | None = None,
    configs: dict[str, PretrainedConfig] | None = None,
    choices: MeasuredChoices | None = None,
    slices: Slices | None = None,
    mean_length: float | None = None,
    steps: int | None = None,
) -> Plan:
    """The plan of a step with these models. `sizes` replace those that the flags tell.

    `configs` are by path, for models without a folder. The plan tells seconds where `choices` remember those
    of the flags, or with `slices` measures them; for rows of `mean_length` tokens, padding included, if that
    is given.
    """
    models = planned_models(specs, only_adapters=args.optimizer.only_optimize_lora, configs=configs)
    shares = args.parallel_sizes.get("sequence", 1)
    timed, sizes = (
        replace(found, length=-(-found.length // shares))
        for found in (args.pass_sizes, sizes or args.pass_sizes)
    )
    memory = MemoryModel(
        models,
        sizes,
        hardware,
        data_ranks=max(1, hardware.ranks // prod(args.parallel_sizes.values())),
        stages=args.parallel_sizes.get("pipeline", 1),
    )
    timing = None
    if choices is not None:
        mean = None if mean_length is None else mean_length / shares
        timing = Timing.of(memory, timed, args.run, choices, mean_length=mean, slices=slices)
    seconds = None if timing is None else timing.step_seconds()
    return Plan(hardware=hardware, phases=memory.phases(), seconds=seconds, steps=steps)
