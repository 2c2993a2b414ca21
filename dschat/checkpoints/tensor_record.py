"""A dataclass of tensors as a part of a checkpoint."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from dschat.distributed.device import current_device

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")


class TensorRecord(Generic[Record]):
    """A record of tensors, integers, dictionaries of these, and None, the same on every rank.

    Its state has a tensor under "field", and the entries of a dictionary under "field.key". `record` is None
    until one is given or restored, on the rank's device.
    """

    def __init__(self, record_class: type[Record], record: Record | None = None) -> None:
        self._class = record_class
        self.record = record

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors by key; integers as tensors, too."""
        state: dict[str, Tensor] = {}
        for field in fields(self._class) if self.record is not None else ():
            value = getattr(self.record, field.name)
            if isinstance(value, Mapping):
                state |= {f"{field.name}.{key}": torch.as_tensor(entry) for key, entry in value.items()}
            elif value is not None:
                state[field.name] = torch.as_tensor(value)
        return state

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Make the record anew; a field without tensors has its default, or None."""
        values: dict[str, Any] = {}
        for field in fields(self._class):
            start = f"{field.name}."
            entries = {key: tensor for key, tensor in state_dict.items() if key.startswith(start)}
            if field.name in state_dict:
                values[field.name] = _restored(state_dict[field.name])
            elif entries:
                values[field.name] = {
                    key.removeprefix(start): _restored(tensor) for key, tensor in entries.items()
                }
            elif field.default is MISSING and field.default_factory is MISSING:
                values[field.name] = None
        self.record = self._class(**values)


def _restored(tensor: Tensor) -> Tensor | int:
    """A single integer is a number; every other tensor belongs on the device."""
    is_number = tensor.dim() == 0 and not tensor.is_floating_point()
    return int(tensor) if is_number else tensor.to(current_device())
