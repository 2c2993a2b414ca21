"""A moving average of the actor's weights."""

import torch
from torch import Tensor, nn

from dschat.checkpoints.state import Placement
from dschat.distributed.collectives import gather_rows
from dschat.distributed.deepspeed_private import (
    is_sharded,
    is_tensor_shard,
    own_shard,
    whole_over_tensor_ranks,
    whole_shape,
    whole_size,
)
from dschat.distributed.device import current_device


def _held_weights(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter: its shard under ZeRO-3, all of it elsewhere."""
    if not is_sharded(parameter):
        return parameter.data
    shard = own_shard(parameter)
    assert shard is not None, "under ZeRO-3 every rank has a shard"
    return shard


class MovingAverage:
    """`average <- decay * average + (1 - decay) * weights`, in fp32: bf16 would round small steps away.

    An average is element by element, so under ZeRO-3 each rank averages its own shard and nothing is gathered
    before the average is exported. Frozen weights, such as LoRA leaves, are their own average and left out.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._decay = decay
        self._averages = {
            name: _held_weights(p).detach().float().clone() for name, p in self._parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights as they are after an optimiser step into the average."""
        for name, parameter in self._parameters.items():
            self._averages[name].lerp_(_held_weights(parameter).float(), 1 - self._decay)

    def weights(self) -> dict[str, Tensor]:
        """The whole averages of trained weights by name, on the CPU, in fp32. Every rank must call it."""
        return {name: self._whole(name) for name in self._averages}

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a part of the averages, as ZeRO-3 has it, and not all of them."""
        return any(map(is_sharded, self._parameters.values()))

    def placement(self, key: str) -> Placement:
        """The averages lie as the weights do: under ZeRO-3 in pieces, with tensor ranks as the layers do."""
        if self.is_sharded:
            return Placement.SHARDED
        return Placement.ALIKE if is_tensor_shard(self._parameters[key]) else Placement.REPLICATED

    def state_dict(self) -> dict[str, Tensor]:
        """What this rank holds of the averages, by the weight's name."""
        return self._averages

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        for name, average in self._averages.items():
            average.copy_(state_dict[name])

    def _whole(self, name: str) -> Tensor:
        parameter, average = self._parameters[name], self._averages[name]
        if is_sharded(parameter):
            shards = gather_rows(average.to(current_device()), axis="data")  # an offloaded one is on the CPU
            # DeepSpeed pads the last shard.
            average = shards[: whole_size(parameter)].view(whole_shape(parameter))
        return whole_over_tensor_ranks(parameter, average).cpu()
