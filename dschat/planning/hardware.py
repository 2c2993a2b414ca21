"""The machines that a plan is for: how much memory devices and hosts have, and how fast they are."""

import re
from dataclasses import dataclass

import psutil
import torch

from dschat.distributed.device import device_type
from dschat.distributed.mesh import mesh
from dschat.errors import UserError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
"""Of sizes in bytes; with an i, as in 24GiB, powers of 1024."""
CUDA_CONTEXT = 0.6e9
"""Bytes of a GPU that libraries take beside tensors: an estimate, not measured."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Devices of one kind, spread over equal hosts."""

    device: str
    """Torch's type, "cpu" or "cuda". On a CPU the memory of the devices is that of the hosts."""
    ranks: int = 1
    ranks_per_host: int = 1
    device_memory: float = 0.0
    """Bytes of one device, 0 where that is not known."""
    host_memory: float = 0.0
    """Bytes of one host, 0 where that is not known."""

    @property
    def is_cpu(self) -> bool:
        """Whether models stand in the memory of the host."""
        return self.device == "cpu"

    @property
    def usable(self) -> float:
        """Bytes of a device that tensors may take, 0 where that is not known."""
        if self.is_cpu or not self.device_memory:
            return self.device_memory
        return self.device_memory - CUDA_CONTEXT


def this_hardware() -> Hardware:
    """What this run has: its ranks, and the memory of this host and of the device in it."""
    kind, host = device_type(), float(psutil.virtual_memory().total)
    ranks_per_host = mesh().machine.size
    memory = host / ranks_per_host
    if kind == "cuda":
        memory = float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return Hardware(
        device=kind,
        ranks=mesh().world.size,
        ranks_per_host=ranks_per_host,
        device_memory=memory,
        host_memory=host,
    )


def bytes_of(text: str) -> float:
    """The bytes that "24GB", "1.5TB", "80GiB" or a plain number name. Raises `UserError` for other text."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if found is None or (found[3] and not found[2]):
        raise UserError(f"{text!r} is no size of memory; write it as in 24GB or 24GiB.")
    power = list(UNITS).index(found[2])
    return float(found[1]) * (1024**power if found[3] else UNITS[found[2]])
