"""A moving average of the actor's weights."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dschat.distributed.collectives import gather_rows
from dschat.distributed.deepspeed_private import own_shard, whole_shape, whole_size
from dschat.distributed.device import current_device
from dschat.distributed.mesh import mesh
from dschat.distributed.zero3 import is_zero3_parameter


def _held_weights(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter: its shard under ZeRO-3, all of it elsewhere."""
    return own_shard(parameter) if is_zero3_parameter(parameter) else parameter.data


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
        return any(map(is_zero3_parameter, self._parameters.values()))

    def state_dict(self) -> dict[str, Tensor]:
        """What this rank holds of the averages, by name."""
        return self._averages

    @torch.no_grad()
    def load_state_dict(self, averages: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave on this rank."""
        for name, average in self._averages.items():
            average.copy_(averages[name])

    @torch.no_grad()
    def load_parts(self, parts: Sequence[Mapping[str, Tensor]]) -> None:
        """Go on from what `state_dict` gave on each of another number of ranks, where it is sharded."""
        for name, average in self._averages.items():
            size = whole_size(self._parameters[name])
            whole = torch.cat([part[name].flatten() for part in parts])[:size]
            own = whole[mesh().data.rank * average.numel() :][: average.numel()]
            average.zero_()  # the end of the last shard belongs to nothing
            average[: own.numel()].copy_(own)

    def _whole(self, name: str) -> Tensor:
        parameter, average = self._parameters[name], self._averages[name]
        if not is_zero3_parameter(parameter):
            return average.cpu()
        shards = gather_rows(average.to(current_device()), axis="data")  # an offloaded shard lies on the CPU
        # DeepSpeed pads the last shard.
        return shards[: whole_size(parameter)].view(whole_shape(parameter)).cpu()
