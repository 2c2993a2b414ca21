"""Choices between ways to compute the same thing, by timing.

Which attention, which width of batches or which generation engine is fastest depends on the machine and the
model, so a run times them when it begins. Two ways round differently. For a run to be repeated and resumed to
the last bit, a choice is made once: a machine remembers it in a file, and a checkpoint has those of its run.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.metadata import version
from math import inf
from pathlib import Path
from typing import Any

import torch

from dschat.console import messages
from dschat.data.user_cache import user_cache
from dschat.distributed.collectives import broadcast_from_rank_0
from dschat.distributed.device import device_type, one_thread, synchronize
from dschat.fingerprint import fingerprint

MARGIN = 0.95
"""A way replaces the first one where it takes less than this share of its time: less is noise."""

SECONDS_KEPT = 7 * 24 * 3600.0
"""After so long what one thing takes is timed again: it may have been timed on a busy machine."""


class MeasuredChoices:
    """The choices of one run. Every rank makes the same calls in the same order."""

    def __init__(
        self, recorded: Mapping[str, str] | None = None, *, folder: Path | None = None, measures: bool = True
    ) -> None:
        """`recorded` are the choices of the checkpoint that the run goes on from.

        `folder` is where the machine remembers choices, by default `machine_folder()`. Without `measures`
        every choice that is not recorded is the first of its ways.
        """
        self.made: dict[str, str] = dict(recorded or {})
        """The way chosen for each name so far, for checkpoints."""
        self._unsaid = set(self.made)
        self._folder, self._measures = folder or machine_folder(), measures

    def choose(
        self,
        name: str,
        ways: Mapping[str, Callable[[], object]],
        *,
        key: Mapping[str, Any] | None = None,
        rounds: int = 3,
        on_one_thread: bool = False,
    ) -> str:
        """The fastest of `ways`, functions that each do the same work in another way.

        The first way is the default: another is taken where it is clearly faster. The least time of `rounds`
        calls counts, after one that warms up; rank 0's times decide. With `on_one_thread` ways on a CPU are
        timed by the processor time of one thread, which other programs hardly move. `key` holds what the
        times depend on besides machine, versions and threads, such as the model's sizes and the precision,
        for JSON. A choice that the checkpoint or the machine has is not measured again, unless its way is not
        among `ways`.
        Says in one line what was chosen and why.
        """
        if self.made.get(name) in ways:
            if name in self._unsaid:
                self._unsaid.remove(name)  # models of equal heads ask again
                messages.info(f"{name}: {self.made[name]} (as the checkpoint has it)")
            return self.made[name]
        if not self._measures or len(ways) == 1:
            self.made[name] = next(iter(ways))
            return self.made[name]
        if on_one_thread and device_type() == "cpu":
            with one_thread():
                found = self._found(name, ways, key, rounds, time.process_time)
        else:
            found = self._found(name, ways, key, rounds, time.perf_counter)
        times = "; ".join(
            f"{way} {spent:.3g} s" if spent >= 1 else f"{way} {1000 * spent:.3g} ms"
            for way, spent in found["numbers"].items()
        )
        messages.info(f"{name}: {found['way']} (measured on this machine: {times})")
        self.made[name] = found["way"]
        return self.made[name]

    def seconds_of(
        self, name: str, run: Callable[[], object], *, key: Mapping[str, Any], alone: bool = False
    ) -> float:
        """The least seconds of a call of `run` that the machine has seen for this `key`; nothing is chosen.

        It is timed where the machine has not done so for `SECONDS_KEPT`, or `alone`: now, by this rank.
        """
        path = self._path(name, [name], key)
        found = None if alone else broadcast_from_rank_0(lambda: _remembered(path, kept_for=SECONDS_KEPT))
        if found is None:
            keep = partial(_least_kept, path, _record(name, _times({name: run}, 10, time.perf_counter), key))
            found = keep() if alone else broadcast_from_rank_0(keep)
        return float(found["numbers"][name])

    def kept_numbers(
        self, name: str, measure: Callable[[], Mapping[str, float]] | None, *, key: Mapping[str, Any]
    ) -> dict[str, float] | None:
        """Numbers by name as `measure` returns them, called once per machine and `key`; nothing is chosen.

        None where the machine does not remember them and `measure` is None.
        """
        path = self._path(name, [], key)
        found = broadcast_from_rank_0(lambda: _remembered(path))
        if found is None and measure is not None:
            numbers = measure()
            found = broadcast_from_rank_0(lambda: _first_kept(path, _record(name, numbers, key)))
        return None if found is None else dict(found["numbers"])

    def _path(self, name: str, ways: Iterable[str], key: Mapping[str, Any] | None) -> Path:
        """The file in which the machine remembers what it measured of these ways."""
        depends_on = {"name": name, "ways": sorted(ways), "key": dict(key or {}), "machine": machine()}
        return self._folder / f"{fingerprint(depends_on)}.json"

    def _found(
        self,
        name: str,
        ways: Mapping[str, Callable[[], object]],
        key: Mapping[str, Any] | None,
        rounds: int,
        clock: Callable[[], float],
    ) -> dict[str, Any]:
        """What the machine remembers of these ways, or what is measured now and kept."""
        path = self._path(name, ways, key)
        found = broadcast_from_rank_0(lambda: _remembered(path))
        if found is None or found.get("way") not in ways:
            seconds = _times(ways, rounds, clock)
            fastest, first = min(ways, key=seconds.__getitem__), next(iter(ways))
            way = fastest if seconds[fastest] < MARGIN * seconds[first] else first
            record = _record(name, seconds, key) | {"way": way}
            found = broadcast_from_rank_0(lambda: _first_kept(path, record))
        return found


def machine_folder() -> Path:
    """Where this machine's user remembers choices."""
    return user_cache() / "dschat" / "choices"


def machine() -> dict[str, Any]:
    """What times depend on besides the work: the processor or GPU, its threads, and the libraries."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    versions = {name: version(name) for name in ("torch", "transformers", "deepspeed")}
    return {"device": device, "threads": torch.get_num_threads()} | versions


def _processor() -> str:
    """The processor's name, or what stands in for it where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, torch.backends.cpu.get_cpu_capability())


def _times(
    ways: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """The least seconds that each way took, in turn so that a slow moment of the machine meets all."""
    for run in ways.values():
        run()
    seconds = dict.fromkeys(ways, inf)
    for _ in range(rounds):
        for way, run in ways.items():
            synchronize()
            start = clock()
            run()
            synchronize()
            seconds[way] = min(seconds[way], clock() - start)
    return seconds


def _record(name: str, numbers: Mapping[str, float], key: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a file holds of what was measured."""
    return {"name": name, "numbers": dict(numbers), "key": dict(key or {}), "machine": machine()}


def _remembered(path: Path, *, kept_for: float = inf) -> dict[str, Any] | None:
    """What a file holds; None where there is none of the last `kept_for` seconds that can be read."""
    try:
        if time.time() - path.stat().st_mtime > kept_for:
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if record.get("numbers") is not None else None
    except (OSError, ValueError, AttributeError):
        return None


def _least_kept(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Keep a record with the least seconds of it and of the one that it replaces."""
    known = (_remembered(path) or record)["numbers"]
    least = {name: min(seconds, known.get(name, seconds)) for name, seconds in record["numbers"].items()}
    with contextlib.suppress(OSError):
        path.unlink()
    return _first_kept(path, {**record, "numbers": least})


def _first_kept(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Keep a record for later runs; return that of another run which measured at once and was first.

    Where the folder cannot be written, nothing is kept.
    """
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        try:
            os.link(temporary, path)
        except FileExistsError:
            first = _remembered(path)
            if first is not None:
                return first
            temporary.replace(path)  # what is there cannot be read
    except OSError:
        return _remembered(path) or record
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return record
