"""Who this process is among several, as job systems and launchers say it in environment variables.

torchrun and the deepspeed launcher set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Job systems
set some of them, or names of their own. What is certain is filled in, and what is not is named.
"""

import os
import re
import socket
import time
from collections.abc import Mapping
from datetime import timedelta

import psutil

from dschat.console import messages
from dschat.errors import UserError

JOB_SYSTEMS = {
    "Slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    "Open MPI": (
        *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        *("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ),
    "MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
"""What each calls RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE."""

DEFAULT_PORT = "29500"
"""That of torch and of DeepSpeed."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")

PATIENCE = timedelta(minutes=30)
"""How much later than the other ranks rank 0 may be there."""

NAME_PATIENCE = timedelta(minutes=2)
"""How long the name of rank 0's machine may be unknown: that of a pod is known a little later."""

NOTE_AFTER = 15.0
"""Seconds of waiting for rank 0 that are worth a line."""

REMEDY = "or start with torchrun or deepspeed, which set it."


def configure_environment(local_rank: int = -1) -> None:
    """Complete this process's variables. Raises `UserError` that names the one that is missing or wrong.

    `local_rank` is the deepspeed launcher's flag; torchrun sets the environment variable instead.
    """
    given = {name: value.strip() for name, value in os.environ.items() if value.strip()}
    if local_rank >= 0:
        given.setdefault("LOCAL_RANK", str(local_rank))
    if "RANK" not in given and given.get("WORLD_SIZE", "1") == "1":
        given |= _of_job_system(given) or {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    size = _number(given, "WORLD_SIZE", 1, None)
    rank = _number(given, "RANK", 0, size - 1)
    local_rank, local_size = _local(given, rank, size)
    if size == 1:
        given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **given}
    if "MASTER_ADDR" not in given:
        raise UserError(
            f"MASTER_ADDR is not set, but WORLD_SIZE is {size}: set it to the address of rank 0's machine on "
            f"every rank, {REMEDY}"
        )
    port = _number(given, "MASTER_PORT", 1, 65535)
    numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    os.environ.update(MASTER_ADDR=given["MASTER_ADDR"], MASTER_PORT=str(port))


def _of_job_system(given: Mapping[str, str]) -> dict[str, str]:
    """The variables of the process group, as far as a job system with several processes tells them."""
    for system, (rank, size, local_rank, local_size) in JOB_SYSTEMS.items():
        if rank not in given or given.get(size, "1") == "1":
            continue
        found = {"RANK": given[rank], "WORLD_SIZE": given[size], "MASTER_PORT": DEFAULT_PORT}
        if local_rank in given:
            found["LOCAL_RANK"] = given[local_rank]
        found |= _of_slurm_nodes(given) if system == "Slurm" else {}
        if given.get(local_size, "").isdecimal():  # Slurm's is a list where there are several nodes
            found["LOCAL_WORLD_SIZE"] = given[local_size]
        if found.get("LOCAL_WORLD_SIZE") == found["WORLD_SIZE"]:
            found["MASTER_ADDR"] = "127.0.0.1"
        if found["RANK"] == "0":
            messages.note(
                f"the {given[size]} processes that {system} started are the ranks.", every_rank=True
            )
        return found | {name: given[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in given}
    return {}


def _of_slurm_nodes(given: Mapping[str, str]) -> dict[str, str]:
    """What Slurm's lists of nodes say: "8(x3),4" are the tasks of each, "gpu[07-09,11],x1" their names."""
    found: dict[str, str] = {}
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", given.get("SLURM_STEP_TASKS_PER_NODE", ""))
    tasks = [number for number, times in counts for _ in range(int(times or 1))]
    node = given.get("SLURM_NODEID", "")
    if node.isdecimal() and int(node) < len(tasks):
        found["LOCAL_WORLD_SIZE"] = tasks[int(node)]
    names = given.get("SLURM_STEP_NODELIST") or given.get("SLURM_JOB_NODELIST", "")
    first = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", names)
    if first:
        found["MASTER_ADDR"] = "".join(part or "" for part in first.groups())
    return found


def _local(given: Mapping[str, str], rank: int, size: int) -> tuple[int, int]:
    """This process's number on its machine, and how many there are."""
    if size == 1:
        return _number({"LOCAL_RANK": "0", **given}, "LOCAL_RANK", 0, None), 1
    name = "LOCAL_SIZE" if "LOCAL_SIZE" in given and "LOCAL_WORLD_SIZE" not in given else "LOCAL_WORLD_SIZE"
    local_size = _number(given, name, 1, size) if name in given else None
    if "LOCAL_RANK" in given:
        # Without a count of their own, all may be on this machine.
        return _number(given, "LOCAL_RANK", 0, (local_size or size) - 1), local_size or size
    if local_size == size or (local_size is None and given.get("MASTER_ADDR") in LOOPBACK):
        return rank, size
    if local_size not in (None, 1):
        raise UserError(
            f"LOCAL_RANK is not set, but {name} is {local_size}: set it to this process's number on its "
            f"machine, 0 to {local_size - 1}, {REMEDY}"
        )
    return 0, 1


def _number(given: Mapping[str, str], name: str, least: int, most: int | None) -> int:
    """The variable as a number in this range."""
    if name not in given:
        others = [f"{other} is {given[other]}" for other in ("RANK", "WORLD_SIZE") if other in given]
        raise UserError(f"{name} is not set, but {' and '.join(others)}: set it on every rank, {REMEDY}")
    text = given[name]
    number = int(text) if text.removeprefix("-").isdecimal() else None
    if number is None or number < least or (most is not None and number > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        why = f", as WORLD_SIZE is {given['WORLD_SIZE']}" if name == "RANK" else ""
        raise UserError(f"{name}={text!r} must be a whole number {limits}{why}; correct it or unset it.")
    return number


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def take_free_port() -> None:
    """For a group of one, which nobody else must find: another port where MASTER_PORT is in use."""
    if os.environ["WORLD_SIZE"] != "1" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    port = os.environ["MASTER_PORT"]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(port)))
        except OSError as error:
            os.environ["MASTER_PORT"] = other = str(free_port())
            why = (error.strerror or str(error)).lower()
            messages.note(f"port {port} is not used ({why}); one process needs any port: {other}.")


def choose_interface() -> None:
    """Let gloo use the interface that leads to rank 0, where ranks are on several hosts.

    By itself it takes the address of the host's name, which is 127.0.1.1 on many systems. GLOO_SOCKET_IFNAME
    in the environment is left as it is.
    """
    if os.environ["WORLD_SIZE"] == os.environ["LOCAL_WORLD_SIZE"] or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    try:
        family, _, _, _, address = socket.getaddrinfo(os.environ["MASTER_ADDR"], 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # of a datagram socket: it only looks for the way
            own = probe.getsockname()[0]
    except OSError:  # no way there yet: `wait_for_rank_0` reports it
        return
    names = (
        name for name, known in psutil.net_if_addrs().items() if own in (entry.address for entry in known)
    )
    name = next(names, None)
    if name is not None and own not in LOOPBACK:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def wait_for_rank_0(patience: timedelta = PATIENCE) -> None:
    """Wait until something listens where the ranks meet, on rank 0 until the name of that place is known.

    Raises `UserError` where that does not happen.
    """
    rank, address, port = (os.environ[name] for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    where = f"MASTER_ADDR {address}, MASTER_PORT {port}"
    start, has_noted = time.monotonic(), False
    while True:
        try:
            if rank == "0":
                socket.getaddrinfo(address, int(port))
            else:
                socket.create_connection((address, int(port)), timeout=10).close()
            return
        except OSError as error:
            waited = time.monotonic() - start
            limit = min(patience, NAME_PATIENCE) if isinstance(error, socket.gaierror) else patience
            if waited > limit.total_seconds():
                raise UserError(
                    f"rank {rank} met nobody at {where} within {limit}: {error}. Rank 0 must run on that "
                    "machine, and no firewall may be between."
                ) from error
            if waited > NOTE_AFTER and not has_noted:
                has_noted = True
                messages.to_stderr(f"note: rank {rank} waits for rank 0 at {where}: {error}")
        time.sleep(1)


def unmet(error: Exception) -> UserError:
    """What to say where the ranks could not meet."""
    address, port, reason = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], str(error).rstrip(".")
    if "EADDRINUSE" not in reason:
        return UserError(
            f"the ranks could not meet at MASTER_ADDR {address}, MASTER_PORT {port}: {reason}. Start all "
            f"{os.environ['WORLD_SIZE']} with these, and choose a port at which no other program listens."
        )
    is_launched = "CROSS_SIZE" in os.environ  # by deepspeed; torchrun listens itself, and says so itself
    start = f"deepspeed --master_port {free_port()}" if is_launched else f"MASTER_PORT={free_port()}"
    return UserError(f"port {port} is in use (another run?); start with one that is free now: {start}")
