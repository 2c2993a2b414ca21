"""Batches from one device to another."""

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch", bound=Any)


def moved(batch: Batch, device: torch.device | str) -> Batch:
    """A batch, a frozen dataclass, whose tensors are on that device, those of batches in it among them."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            found[name] = value.to(device, non_blocking=True)
        elif is_dataclass(value):
            found[name] = moved(value, device)
    return replace(batch, **found)
