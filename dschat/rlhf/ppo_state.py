"""Rollouts and judgements as flat tensors by name, in which form a checkpoint keeps them, and back."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import Tensor


def flat_names(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under prefix.name."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def of_name(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those under prefix.name, by name."""
    start = f"{prefix}."
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


def flat_tensors(record: Any, prefix: str) -> dict[str, Tensor]:
    """The fields of a dataclass of tensors, integers, dictionaries of these, and None, by dotted names."""
    flat = {}
    for field in fields(record):
        value, name = getattr(record, field.name), f"{prefix}.{field.name}"
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": torch.as_tensor(entry) for key, entry in value.items()}
        elif value is not None:
            flat[name] = torch.as_tensor(value)
    return flat


def from_flat_tensors(
    record_class: type, prefix: str, tensors: Mapping[str, Tensor], device: torch.device
) -> Any:
    """What `flat_tensors` was given, on the device."""
    values: dict[str, Any] = {}
    for field in fields(record_class):
        name = f"{prefix}.{field.name}"
        nested = of_name(name, tensors)
        if name in tensors:
            values[field.name] = _restored(tensors[name], device)
        elif nested:
            values[field.name] = {key: _restored(tensor, device) for key, tensor in nested.items()}
        elif field.default is MISSING and field.default_factory is MISSING:
            values[field.name] = None
    return record_class(**values)


def _restored(tensor: Tensor, device: torch.device) -> Tensor | int:
    """A single integer was one; all else belongs on the device."""
    is_number = tensor.dim() == 0 and not tensor.is_floating_point()
    return int(tensor) if is_number else tensor.to(device)
