"""Rollouts and judgements as flat tensors by name, in which form a checkpoint keeps them, and back."""

from collections.abc import Mapping
from dataclasses import fields
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
    """The fields of a dataclass of tensors, integers, dictionaries of tensors, and None, by dotted names."""
    flat = {}
    for field in fields(record):
        value, name = getattr(record, field.name), f"{prefix}.{field.name}"
        if isinstance(value, Mapping):
            flat |= flat_names(name, value)
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
        if name in tensors:
            is_number = field.type in (int, "int")
            values[field.name] = int(tensors[name]) if is_number else tensors[name].to(device)
        else:
            nested = of_name(name, tensors)
            values[field.name] = {key: tensor.to(device) for key, tensor in nested.items()} or None
    return record_class(**values)
