"""What the parts of a run keep in a checkpoint, and how they get it back, on another number of ranks too.

A part is an object with torch's `Stateful` protocol. Its `state_dict` has tensors under keys of its own, and
beside them values that JSON can hold. In a checkpoint the values stand under the part's name, a tensor under
"part.key".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

from dschat.distributed.mesh import mesh


class Placement(Enum):
    """How a part's tensor lies over the ranks; the words are those of torch's DTensor."""

    REPLICATED = "replicated"
    """Every rank holds the same tensor; rank 0 writes it."""
    ALIKE = "alike"
    """The ranks of data hold the same tensor; those of another axis may hold others."""
    SHARDED = "sharded"
    """The ranks of data, in their order, hold equal pieces of one flat tensor, whose end may be padding."""
    SUM = "sum"
    """A rank holds its share of a sum over the ranks of data."""
    MAX = "max"
    """A rank holds its candidate for the largest over the ranks of data."""


@runtime_checkable
class Placed(Protocol):
    """A part with tensors that are not the same on every rank; those of other parts are `REPLICATED`."""

    def placement(self, key: str) -> Placement:
        """The placement of the tensor that `state_dict` has under the key."""


@dataclass(frozen=True)
class PartStates:
    """The states of all parts, by the place in a checkpoint where they are written."""

    values: dict[str, Any]
    """Values for JSON, by part."""
    own: dict[str, Tensor]
    """Tensors of this rank, by "part.key"."""
    shared: dict[str, Tensor]
    """Tensors that every rank holds alike, by "part.key"."""


def collect(parts: Mapping[str, Any]) -> PartStates:
    """The states of parts by name; what is not `Stateful` is a value for JSON itself."""
    states = PartStates({}, {}, {})
    for name, part in parts.items():
        if not isinstance(part, Stateful):
            states.values[name] = part
            continue
        values = {}
        for key, value in part.state_dict().items():
            if not isinstance(value, Tensor):
                values[key] = value
            elif _placement(part, key) is Placement.REPLICATED:
                states.shared[f"{name}.{key}"] = value
            else:
                states.own[f"{name}.{key}"] = value
        if values:
            states.values[name] = values
    return states


@dataclass(frozen=True)
class Progress:
    """Where a run stands, and what its parts get back from the checkpoint."""

    step: int = 0
    """Steps done; 0: the run begins, and there is no checkpoint."""
    values: dict[str, Any] = field(default_factory=dict)
    """`PartStates.values` of the checkpoint."""
    own: Mapping[str, Tensor] = field(default_factory=dict)
    """`PartStates.own` of this rank, on the CPU; empty where the number of ranks has changed."""
    by_rank: Sequence[Mapping[str, Tensor]] = ()
    """`PartStates.own` of this rank's neighbours of data among those that saved, on the CPU, where the number
    of ranks has changed."""
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    """`PartStates.shared` on the CPU."""

    def restore(self, parts: Mapping[str, Stateful]) -> None:
        """Load the parts in their order; one of which the checkpoint has nothing is left as it is."""
        for name, part in parts.items():
            state = {**self.values.get(name, {}), **_of_part(name, self.shared), **self._own_of(name, part)}
            if state:
                part.load_state_dict(state)

    def _own_of(self, name: str, part: Stateful) -> dict[str, Tensor]:
        """The part's tensors of this rank, made of those of all ranks where their number has changed."""
        if not self.by_rank:
            return _of_part(name, self.own)
        present, by_rank = part.state_dict(), [_of_part(name, tensors) for tensors in self.by_rank]
        return {
            key: _merged([tensors[key] for tensors in by_rank], _placement(part, key), present.get(key))
            for key in by_rank[0]
        }


def _placement(part: Stateful, key: str) -> Placement:
    return part.placement(key) if isinstance(part, Placed) else Placement.REPLICATED


def _of_part(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a part, by key."""
    start = f"{name}."
    return {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}


def _merged(tensors: Sequence[Tensor], placement: Placement, present: Tensor | None) -> Tensor:
    """This rank's tensor made of those of the ranks that saved; `present` is its piece of a `SHARDED` one."""
    rank = mesh().data.rank
    if placement is Placement.ALIKE:
        return tensors[0]
    if placement is Placement.MAX:
        return torch.stack(list(tensors)).amax(dim=0)
    if placement is Placement.SUM:
        total = torch.stack(list(tensors)).sum(dim=0)
        return total if rank == 0 else torch.zeros_like(total)
    assert placement is Placement.SHARDED, f"a tensor of a rank's own cannot be {placement.value}"
    assert present is not None, "a sharded tensor is restored into a piece of it"
    size = present.numel()
    piece = torch.cat([tensor.flatten() for tensor in tensors])[rank * size :][:size]
    return torch.nn.functional.pad(piece, (0, size - len(piece))).view(present.shape)
