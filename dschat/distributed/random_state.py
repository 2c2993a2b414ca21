"""Seeds, and where the random generators of a rank stand."""

import random
from typing import Any

import numpy
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from dschat.distributed.mesh import mesh


def seed_ranks_apart(seed: int) -> None:
    """Seed ranks that read other rows or tokens, or have other layers, with a number of their own, derived of
    both: they draw their dropout independently, and the ranks that share a layer's weights draw it alike."""
    now = mesh()
    place = (now.pipeline.rank * now.data.size + now.data.rank) * now.sequence.size + now.sequence.rank
    derived = numpy.random.SeedSequence([seed, place]).generate_state(1, numpy.uint64)
    seed_everything(int(derived[0]) % 2**63)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch alike on every rank, as new weights must be; sampling has its own keys."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


def random_state() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Where this rank's random generators stand: Python's and NumPy's as JSON, torch's and the device's."""
    legacy: Any = numpy.random.get_state()  # a tuple, which its types say is a dictionary or one
    name, keys, *rest = legacy
    numbers = {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}
    return numbers, {"torch": torch.get_rng_state(), "device": get_accelerator().get_rng_state().cpu()}


def restore_random_state(numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Go on from what `random_state` said."""
    version, internal, gauss = numbers["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = numbers["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    get_accelerator().set_rng_state(tensors["device"])
    torch.set_rng_state(tensors["torch"])
