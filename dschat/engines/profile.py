"""`--profile`: a trace of a few steps by torch's profiler, and a page that says where their time went."""

import gzip
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile

from dschat.arguments import RunArguments
from dschat.console import messages
from dschat.distributed.device import peak_memory_gib
from dschat.distributed.mesh import mesh
from dschat.engines.speed import SECONDS
from dschat.runs.measured_choices import machine
from dschat.runs.output_folder import PROFILE

SUMMARY = "summary.md"
NUM_OPERATORS = 20
"""Operators in the summary's table."""
COPIES = ("aten::copy_", "aten::cat", "aten::clone", "aten::fill_", "aten::zero_", "aten::_foreach_copy_")
PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "aten::linear", "mkldnn::")
ATTENTION = ("attention", "softmax")
WAITS = ("aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaDeviceSynchronize")


class StepProfiler:
    """Profiles the steps of `--profile`, on every rank; nothing without the flag."""

    def __init__(self, run: RunArguments) -> None:
        self._first, self._last = run.profiled_steps or (0, 0)
        self._folder = Path(run.output_dir or "") / PROFILE
        self._profiler: profile | None = None
        self._figures: list[Mapping[str, float]] = []

    def after_step(self, step: int, figures: Mapping[str, float] | None = None) -> None:
        """Begin or end the profile between steps: `step` is done, with these metrics.

        It is called before the first step too, with the number of steps done so far.
        """
        if self._profiler is not None:
            self._figures.append(figures or {})
            if step >= self._last:
                self._finish(step)
        elif self._first <= step + 1 <= self._last and not self._figures:
            self._profiler = profile()
            self._profiler.start()

    def close(self, step: int) -> None:
        """The run ends after this step: write what was profiled; say where a profile never began."""
        if self._profiler is not None:
            self._finish(step)
        elif self._first and not self._figures and not (self._folder / SUMMARY).exists():
            asked = _named((self._first, self._last))
            messages.warning(f"--profile: the run went on to step {step} without {asked}: no profile.")

    def _finish(self, last: int) -> None:
        profiler, self._profiler = self._profiler, None
        assert profiler is not None, "a profile that ends has begun"
        profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        world = mesh().world
        suffix = f"_rank{world.rank}" if world.size > 1 else ""
        _write_trace(profiler, self._folder / f"trace{suffix}.json.gz")
        if world.rank == 0:
            first = last - len(self._figures) + 1
            page = summary(profiler.key_averages(), self._figures, steps=(first, last))
            (self._folder / SUMMARY).write_text(page, encoding="utf-8")
            messages.info(f"profile of {_named((first, last))}: {self._folder}/{SUMMARY}")


def _write_trace(profiler: profile, path: Path) -> None:
    plain = path.with_suffix("")
    profiler.export_chrome_trace(str(plain))
    with plain.open("rb") as source, gzip.open(path, "wb", compresslevel=5) as target:
        shutil.copyfileobj(source, target)
    plain.unlink()


def _named(steps: tuple[int, int]) -> str:
    return f"step {steps[0]}" if steps[0] == steps[1] else f"steps {steps[0]} to {steps[1]}"


def summary(events: Any, figures: list[Mapping[str, float]], *, steps: tuple[int, int]) -> str:
    """The page in Markdown: of the profiler's averages and of the steps' metrics."""
    shares = _shares(events)
    lines = [
        f"# Profile of {_named(steps)}",
        "",
        f"torch {version('torch')}, {machine()['device']}, {torch.get_num_threads()} threads; memory peak "
        f"{peak_memory_gib():.2f} GiB. The profiler itself slows the steps down.",
        *_rates(figures),
        "",
        "## Where the time of a step went",
        "",
        *_phases(figures),
        "",
        f"## The {NUM_OPERATORS} operators with the most time of their own",
        "",
        *_operators(events),
        "",
        "Rows with the name of a phase are the time that Python spends between operators.",
        "",
        "## What to look at",
        "",
        *(f"- {line}" for line in advice(shares, _mean_seconds(figures))),
        "- trace.json.gz opens in https://ui.perfetto.dev and in chrome://tracing.",
    ]
    return "\n".join(lines) + "\n"


def _rates(figures: list[Mapping[str, float]]) -> list[str]:
    means = {
        name: sum(line[name] for line in figures) / len(figures)
        for name in ("tokens_per_second", "flops_per_second", "peak_share")
        if figures and all(name in line for line in figures)
    }
    if not means:
        return []
    return [
        f"{means['tokens_per_second']:,.0f} tokens/s, {means['flops_per_second'] / 1e12:.3g} TFLOP/s of the "
        f"model, {means['peak_share']:.1%} of the measured peak."
    ]


def _mean_seconds(figures: list[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for line in figures for name in line if name.startswith(SECONDS))
    totals = {name: sum(line.get(name, 0.0) for line in figures) for name in names}
    return {name.removeprefix(SECONDS): total / len(figures) for name, total in totals.items()}


def _phases(figures: list[Mapping[str, float]]) -> list[str]:
    seconds = _mean_seconds(figures)
    whole = sum(seconds.values()) or 1.0
    rows = [f"| {phase} | {value:.4f} | {value / whole:.0%} |" for phase, value in seconds.items()]
    return ["| phase | seconds a step | share |", "|---|---|---|", *rows]


def _own_time(event: Any) -> float:
    """An operator's time without what it calls, in microseconds: on the GPU where there is one."""
    return float(event.self_device_time_total or event.self_cpu_time_total)


def _operators(events: Any) -> list[str]:
    whole = sum(map(_own_time, events)) or 1.0
    largest = sorted(events, key=_own_time, reverse=True)[:NUM_OPERATORS]
    rows = [
        f"| `{e.key}` | {e.count} | {_own_time(e) / 1000:.2f} | {_own_time(e) / whole:.1%} |" for e in largest
    ]
    return ["| operator | calls | ms | share |", "|---|---|---|---|", *rows]


def _shares(events: Any) -> dict[str, float]:
    """Shares of all operators' own time of kinds of work, and the number of waits for the device."""
    whole = sum(map(_own_time, events)) or 1.0
    kinds = {"copies": COPIES, "products": PRODUCTS, "attention": ATTENTION, "waits": WAITS}
    times = {
        kind: sum(_own_time(e) for e in events if any(name in e.key for name in names)) / whole
        for kind, names in kinds.items()
    }
    return {**times, "num_waits": sum(e.count for e in events if any(name in e.key for name in WAITS))}


def advice(shares: Mapping[str, float], seconds: Mapping[str, float]) -> list[str]:
    """What the figures point at, each in a sentence. `shares` as in `_shares`, `seconds` by phase."""
    whole = sum(seconds.values()) or 1.0
    part = {phase: value / whole for phase, value in seconds.items()}
    products, attention = shares["products"], shares["attention"]
    found = [f"matrix products are {products:.0%} of the operators' time, attention {attention:.0%}."]
    if shares["copies"] > 0.15:
        found.append(
            f"copies and fills are {shares['copies']:.0%}: look for casts between precisions, `cat`, and "
            "tensors made anew in every step."
        )
    if part.get("data", 0.0) > 0.1:
        found.append(f"data take {part['data']:.0%} of a step: the device waits for collation.")
    if part.get("optimizer", 0.0) > 0.25:
        found.append(
            f"the optimiser takes {part['optimizer']:.0%} of a step: larger batches "
            "(--gradient_accumulation_steps) spread it over more tokens."
        )
    if part.get("generation", 0.0) > 0.5:
        found.append(
            f"generation takes {part['generation']:.0%} of a PPO step: see --rollout_backend, and a larger "
            "--per_device_generation_batch_size."
        )
    beside = part.get("evaluation", 0.0) + part.get("saving", 0.0)
    if beside > 0.2:
        found.append(f"evaluation and saving take {beside:.0%}: see --eval_interval and --save_interval.")
    if torch.cuda.is_available() and shares["num_waits"] > 0:
        found.append(f"the host waited for the GPU {shares['num_waits']:.0f} times.")
    return found
