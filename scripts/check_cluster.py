"""Check, before a run, what it needs of its hosts; start it as the run itself, on all hosts.

    torchrun --nnodes 2 ... scripts/check_cluster.py [--storage FOLDER] [--min_bandwidth 1] [--min_space 20]
    python scripts/launch.py --hostfile hostfile scripts/check_cluster.py ...

Rendezvous, addresses and ports, versions, clocks, devices, storage and the bandwidth between hosts. It prints
what is there, and what is wrong with its remedy. Exit code 0: nothing is wrong; 1: something is; 2: the ranks
could not meet. FOLDER is the --output_dir of the run, or the folder above it.
"""

import argparse
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dschat.arguments import ReadableParser
from dschat.console import messages
from dschat.fingerprint import files_fingerprint
from dschat.program import readable_errors

PACKAGES = ("dschat", "torch", "transformers", "deepspeed", "numpy", "safetensors")
CODE = Path(__file__).resolve().parents[1] / "dschat"
MAX_SKEW = 2.0
"""Seconds that clocks may differ: files are compared by age, and logs by time."""
MEGABYTES = 16
"""Size of the tensor whose sum over hosts is timed."""
Facts = dict[str, Any]


def facts(folder: Path) -> Facts:
    """What this rank knows of its host."""
    import torch
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    kind = accelerator.device_name()
    devices = accelerator.device_count() if kind != "cpu" else 0
    known: Facts = {
        "host": socket.gethostname(),
        "local_size": int(os.environ["LOCAL_WORLD_SIZE"]),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
            "code of dschat": files_fingerprint(sorted(CODE.rglob("*.py")))[:8],
        },
        "device": torch.cuda.get_device_name() if kind == "cuda" else kind,
        "devices": devices,
        "interface": os.environ.get("GLOO_SOCKET_IFNAME", ""),
        "port_problem": _port_problem(),
        "storage_problem": None,
        "free_gb": 0.0,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        known["free_gb"] = shutil.disk_usage(folder).free / 1e9
    except OSError as error:
        known["storage_problem"] = error.strerror or str(error)
    return known


def _version(package: str) -> str:
    """The version that this Python imports."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _port_problem() -> str | None:
    """Why other hosts could not connect to a port that this host picks; None where it can listen."""
    try:
        with socket.socket() as listener:
            listener.bind(("", 0))
            listener.listen()
    except OSError as error:
        return error.strerror or str(error)
    return None


def problems(hosts: Sequence[Facts], min_space: float) -> Iterator[str]:
    """What is wrong, in words with the remedy. `hosts` are the facts of each host's first rank."""
    first = hosts[0]
    for known in hosts[1:]:
        for name, number in known["versions"].items():
            if number != first["versions"][name]:
                yield (
                    f"{name} is {number} on {known['host']} and {first['versions'][name]} on "
                    f"{first['host']}: install the same on all hosts."
                )
        if known["device"] != first["device"]:
            yield (
                f"{known['host']} has {known['device']} and {first['host']} {first['device']}: the slowest "
                "decides the pace, and kinds do not mix; take hosts of one kind."
            )
        if known["local_size"] != first["local_size"]:
            yield (
                f"{known['local_size']} processes run on {known['host']} and {first['local_size']} on "
                f"{first['host']}: give the same --nproc_per_node, or slots, to each."
            )
    for known in hosts:
        host = known["host"]
        if known["devices"] and known["devices"] != known["local_size"]:
            yield (
                f"{host} shows {known['devices']} devices and runs {known['local_size']} processes: start "
                "one per device, or choose devices with CUDA_VISIBLE_DEVICES."
            )
        if known["port_problem"]:
            yield f"{host} cannot listen on a port ({known['port_problem']}): lift its limits or sandbox."
        if known["storage_problem"]:
            yield (
                f"--storage on {host} cannot be written ({known['storage_problem']}): mount it, or correct "
                "its rights."
            )
        elif known["free_gb"] < min_space:
            yield (
                f"--storage on {host} has {known['free_gb']:.1f} GB left, less than --min_space "
                f"{min_space:g}: make room."
            )
        if abs(known.get("skew", 0.0)) > MAX_SKEW:
            yield (
                f"the clock of {host} is {known['skew']:+.1f} s from that of {first['host']}: synchronise "
                "them (chronyd or ntpd)."
            )
    names = [known["host"] for known in hosts]
    for host in sorted({name for name in names if names.count(name) > 1}):
        yield f"{names.count(host)} hosts have the name {host}: give each a name of its own."


def clock_skews() -> list[float]:
    """Seconds that each rank's clock is ahead of rank 0's, by the best of five barriers."""
    from dschat.distributed.collectives import all_gather_object, barrier

    least: list[float] = []
    for _ in range(5):
        barrier(axis="world")
        times = all_gather_object(time.time(), axis="world")
        skews = [there - times[0] for there in times]
        least = min(least or skews, skews, key=lambda found: max(map(abs, found)))
    return least


def bandwidth(firsts: Sequence[int]) -> dict[tuple[int, int], float]:
    """GB/s from each host's first rank to that of the next, by their ranks."""
    import torch
    import torch.distributed as dist

    from dschat.distributed.collectives import all_gather_object, barrier
    from dschat.distributed.device import current_device, synchronize
    from dschat.distributed.mesh import mesh

    rank, found = mesh().world.rank, {}
    tensor = torch.zeros(MEGABYTES * 2**20, dtype=torch.uint8, device=current_device())
    pairs = [(a, b) for n, a in enumerate(firsts) for b in firsts[n + 1 : n + 2]]
    for pair in pairs:
        seconds = 0.0
        barrier(axis="world")
        if rank in pair:
            for times in range(3):  # the first one makes the connection
                synchronize()
                start = time.perf_counter()
                for sender, receiver in (pair, pair[::-1]):
                    if rank == sender:
                        dist.send(tensor, receiver)
                    else:
                        dist.recv(tensor, sender)
                synchronize()
                spent = time.perf_counter() - start
                seconds = min(seconds, spent) if times > 1 else spent
        found[pair] = 2 * MEGABYTES * 2**20 / 1e9 / max(all_gather_object(seconds, axis="world"))
    return found


def check(options: argparse.Namespace) -> list[str]:
    """Meet the other ranks, print what is there, and return what is wrong, on every rank."""
    from dschat.distributed.collectives import all_gather_object
    from dschat.distributed.mesh import mesh
    from dschat.distributed.process_group import init_process_group
    from dschat.distributed.storage import first_ranks, storage_of

    start = time.monotonic()
    limit = timedelta(seconds=options.meet_within)
    init_process_group(options.local_rank, host_timeout=options.host_timeout, timeout=limit)
    met = time.monotonic() - start
    folder = Path(options.storage)
    by_rank = all_gather_object(facts(folder), axis="world")
    firsts = sorted(set(first_ranks()))
    hosts = [by_rank[first] for first in firsts]
    skews = clock_skews()
    for known, first in zip(hosts, firsts, strict=True):
        known["skew"] = skews[first]
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    messages.info(
        f"rendezvous: {mesh().world.size} ranks on {len(hosts)} hosts met at {where} in {met:.1f} s"
    )
    for known, first in zip(hosts, firsts, strict=True):
        versions = ", ".join(f"{name} {number}" for name, number in known["versions"].items())
        messages.info(
            f"{known['host']} (rank {first} first): {known['local_size']} processes, {known['device']} "
            f"x {known['devices'] or 1}, clock {known['skew']:+.3f} s, {known['free_gb']:.1f} GB free"
            f"{', interface ' + known['interface'] if known['interface'] else ''}; {versions}"
        )
    wrong = list(problems(hosts, options.min_space))
    if not any(known["storage_problem"] for known in hosts):
        storage = storage_of(folder)
        kind = "is shared by all hosts" if storage.is_shared else "is another disk on each host, or on some"
        messages.info(f"storage: {folder} {kind} (docs/multi_node.md says what that means)")
    for (a, b), speed in bandwidth(firsts).items():
        names = f"{by_rank[a]['host']} and {by_rank[b]['host']}"
        messages.info(f"bandwidth between {names}: {speed:.2f} GB/s")
        if speed < options.min_bandwidth:
            wrong.append(
                f"{speed:.2f} GB/s between {names} are less than --min_bandwidth {options.min_bandwidth:g}: "
                "see which interface is used (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME, NCCL_DEBUG=INFO)."
            )
    return wrong


def main() -> None:
    """Check and report; the exit code says whether something is wrong."""
    parser = ReadableParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default=".", help="folder in which the run will write")
    parser.add_argument("--min_bandwidth", type=float, default=0.05, help="GB/s between hosts")
    parser.add_argument("--min_space", type=float, default=10.0, help="GB left on the disk of --storage")
    parser.add_argument(
        "--host_timeout", type=float, default=60.0, help="seconds until a silent host is lost"
    )
    parser.add_argument(
        "--meet_within", type=float, default=300.0, help="seconds until all ranks must have met"
    )
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    with readable_errors():
        options = parser.parse_args()
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # the message at the end says what is wrong
        from dschat.distributed.process_group import destroy_process_group

        wrong = check(options)
        for problem in wrong:
            messages.info(f"PROBLEM: {problem}")
        if not wrong:
            messages.info("nothing is wrong.")
        destroy_process_group(1 if wrong else 0)
        sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
