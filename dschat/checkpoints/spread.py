"""Checkpoints of a run whose hosts have disks of their own: each has the files that its ranks wrote.

A checkpoint of that kind is whole where the hosts of the run have all its files together; what a host lacks
when the run goes on is copied to it.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dschat.distributed.collectives import all_gather_object, first_error_across_ranks
from dschat.distributed.mesh import mesh
from dschat.distributed.storage import Storage, fetch
from dschat.runs.atomic_folder import Files, damage, facts_of, flushed, mark_complete

OF_A_RANK = re.compile(r"(^|/)(bf16_|fp16_)?(rank|zero_pp_rank)_\d+")
"""What the names of files begin with that their rank alone reads, ours and DeepSpeed's."""

Holdings = dict[str, dict[str, Any]]
"""What is on a disk, by checkpoint: "serial", "holders", "files" that are there, "ranks" and "problem"."""


def spread_facts(storage: Storage, found: Sequence[Files]) -> dict[str, Any]:
    """For the mark of a checkpoint on one disk of several: the rank that measured each file of the whole.

    `found` are the files of each rank. "ranks" are those that see this disk.
    """
    holders = {name: rank for rank, files in enumerate(found) for name in files}
    return {"ranks": list(storage.own), "holders": holders}


def holdings(folders: Sequence[Path]) -> Holdings:
    """What this disk has of the checkpoints `folders`, without those that have no mark. Reads every byte."""
    held: Holdings = {}
    for folder in folders:
        facts = facts_of(folder)
        if facts is not None:
            holders = facts.get("holders") or dict.fromkeys(facts["files"], 0)
            held[folder.name] = {
                "serial": facts["serial"],
                "holders": holders,
                "files": [name for name in holders if (folder / name).is_file()],
                "ranks": facts.get("ranks"),
                "problem": damage(folder),
            }
    return held


def damage_of_all(folder: Path, by_rank: Sequence[Holdings]) -> str | None:
    """The damage of a checkpoint in words, of what the writers of all disks hold; None where it is whole."""
    held = {rank: known[folder.name] for rank, known in enumerate(by_rank) if folder.name in known}
    if not held:
        return damage(folder)  # which says what is wrong with its mark
    for rank, entry in held.items():
        if entry["problem"]:
            return entry["problem"] if len(by_rank) == 1 else f"on the host of rank {rank} {entry['problem']}"
    there = {name for entry in held.values() for name in entry["files"]}
    holders: dict[str, int] = next(iter(held.values()))["holders"]
    missing = sorted(holders.keys() - there)
    if not missing:
        return None
    lost = f"{missing[0]}, which rank {holders[missing[0]]} wrote to the disk of its own host,"
    return f"{lost} is on no host of this run"


def complete_disks(folder: Path, storage: Storage, by_rank: Sequence[Holdings]) -> str | None:
    """Copy to every disk what its ranks will read of the checkpoint `folder`. Every rank calls it.

    Where ranks have moved to other hosts, or their number has changed, that is all of it. Returns on every
    rank what went wrong on any.
    """
    known = next(entry for held in by_rank if (entry := held.get(folder.name)))
    names: Mapping[str, int] = known["holders"]
    mine = by_rank[storage.own[0]].get(folder.name, {})
    has_stayed = mine.get("ranks") == list(storage.own) and mesh().world.size == 1 + max(names.values())
    needed = [name for name in names if not (has_stayed and OF_A_RANK.search(name))]
    lacking = [name for name in needed if not (folder / name).is_file()]
    problem = fetch(folder, lacking, storage)

    def mark() -> None:
        if storage.is_writer and lacking:
            there = [name for name in names if (folder / name).is_file()]
            facts = {"ranks": mine.get("ranks"), "holders": dict(names)}
            mark_complete(folder, flushed(folder, there), serial=known["serial"], **facts)

    return problem or first_error_across_ranks(mark, axis="world")


def gather_holdings(folders: Sequence[Path], storage: Storage) -> list[Holdings]:
    """The holdings of every disk, at the place of its writer. Every rank calls it."""
    return all_gather_object(holdings(folders) if storage.is_writer else {}, axis="world")
