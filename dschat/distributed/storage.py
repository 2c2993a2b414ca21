"""Which ranks see the same files: all of a run where its hosts share a disk, else those of each host."""

import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dschat.distributed.collectives import (
    all_gather_object,
    broadcast,
    broadcast_from_rank_0,
    first_error_across_ranks,
)
from dschat.distributed.device import current_device
from dschat.distributed.mesh import mesh
from dschat.distributed.watchdog import machine_number

CHUNK = 2**25
"""Bytes of a file that are sent at once."""


@dataclass(frozen=True)
class Storage:
    """The ranks of the run in groups that see the same folder; the lowest rank of each is its writer."""

    groups: tuple[tuple[int, ...], ...]

    @property
    def own(self) -> tuple[int, ...]:
        """The ranks that see what this rank sees, itself included."""
        return next(group for group in self.groups if mesh().world.rank in group)

    @property
    def is_shared(self) -> bool:
        """Whether all ranks see the same folder."""
        return len(self.groups) == 1

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes what its group needs once: rank 0, and one on every other disk."""
        return mesh().world.rank == self.own[0]


def first_ranks() -> list[int]:
    """For each rank the lowest one on its machine. Every rank calls it."""
    machines = all_gather_object(machine_number(), axis="world")
    return [machines.index(machine) for machine in machines]


def storage_of(folder: Path | None) -> Storage:
    """Who sees the same `folder`, which is there on every host. Every rank calls it.

    The first rank of each host makes a file with a random name, and all look for all of them: a name that was
    never asked for is in no cache of a network file system.
    """
    firsts, rank = first_ranks(), mesh().world.rank
    hosts = sorted(set(firsts))
    if folder is None or len(hosts) == 1:
        return Storage((tuple(range(len(firsts))),))
    token = broadcast_from_rank_0(lambda: secrets.token_hex(8))
    paths = {host: folder / f".seen-{token}-{host}" for host in hosts}

    def make() -> None:
        if rank in paths:
            paths[rank].touch()

    problem = first_error_across_ranks(make, axis="world")
    visible = [host for host, path in paths.items() if path.exists()]
    seen = all_gather_object(min(visible, default=rank), axis="world")
    if rank in paths:
        paths[rank].unlink(missing_ok=True)
    if problem:
        raise OSError(problem)
    lowest = [seen[first] for first in firsts]
    return Storage(tuple(tuple(r for r, low in enumerate(lowest) if low == g) for g in sorted(set(lowest))))


def fetch(folder: Path, lacking: Collection[str], storage: Storage) -> str | None:
    """Copy files from other hosts into `folder`: those that this rank, a writer, lacks there.

    Every rank calls it. Returns on every rank what went wrong on any; a file that no host has is left out.
    """
    rank, mine = mesh().world.rank, frozenset(lacking if storage.is_writer else ())
    wanted = sorted({name for names in all_gather_object(sorted(mine), axis="world") for name in names})
    sizes = {
        name: (folder / name).stat().st_size
        for name in (wanted if storage.is_writer else ())
        if name not in mine and (folder / name).is_file()
    }
    problems: list[str] = []
    owners = all_gather_object(sizes, axis="world")
    for name in wanted:
        source = next((number for number, sizes in enumerate(owners) if name in sizes), None)
        if source is not None:
            wants = name in mine or rank == source
            _send(folder / name if wants else None, owners[source][name], source, problems)
    return first_error_across_ranks(lambda: next(iter(problems), None), axis="world")


def _send(path: Path | None, size: int, source: int, problems: list[str]) -> None:
    """Send the file of rank `source` to every rank; those with a `path` keep it. Takes part to the end."""
    is_source = mesh().world.rank == source
    part = path.with_name(f".{path.name}.part") if path and not is_source else None

    def attempt(work: Callable[[], object]) -> None:
        try:
            work() if not problems else None
        except OSError as error:
            problems.append(str(error))

    if part:
        attempt(lambda: part.parent.mkdir(mode=0o700, parents=True, exist_ok=True))
        attempt(lambda: part.write_bytes(b""))
    for start in range(0, size, CHUNK):
        chunk = torch.empty(min(CHUNK, size - start), dtype=torch.uint8)
        if is_source and path:
            attempt(partial(_read, path, start, chunk))
        chunk = broadcast(chunk.to(current_device()), source=source, axis="world").cpu()
        if part:
            attempt(partial(_append, part, chunk))
    if part and path:
        attempt(lambda: part.replace(path))


def _read(path: Path, start: int, chunk: Tensor) -> None:
    """Fill the chunk with bytes of the file."""
    with path.open("rb") as file:
        file.seek(start)
        file.readinto(chunk.numpy().data)


def _append(path: Path, chunk: Tensor) -> None:
    with path.open("ab") as file:
        file.write(chunk.numpy().data)
