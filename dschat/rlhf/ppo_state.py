"""What a checkpoint keeps of PPO: its position, and rollouts and judgements as flat tensors by name."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass
class Position:
    """Where PPO stands: the numbers that a checkpoint keeps."""

    ppo_step: int = 0
    """Rollout batches made so far."""
    minibatches_done: int = 0
    """Of the present PPO step; those that an early stop skips are among them."""
    updates_done: int = 0
    """Of those, the optimiser steps begun."""
    has_moved_enough: bool = False
    """Whether --target_approx_kl has ended the update."""
    num_skipped: int = 0
    """Steps of actor or critic in this PPO step that were not finite."""
    nonfinite_scores: int = 0
    """Of this rollout batch."""
    num_text_steps: int = 0
    """Optimiser steps of the run that had texts."""

    def begin_ppo_step(self) -> None:
        """Nothing is learned yet of the next rollout batch."""
        self.minibatches_done = self.updates_done = self.num_skipped = self.nonfinite_scores = 0
        self.has_moved_enough = False


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
