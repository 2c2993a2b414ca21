"""The bytes that a DeepSpeed engine holds on a rank.

What DeepSpeed 0.19.8 holds at each ZeRO stage was counted by following every allocation of an engine through
two optimiser steps (docs/hardware.md says how); `EngineMemory` has these numbers per weight.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from dschat.planning.hardware import Hardware
from dschat.planning.models import PlannedModel

BUCKET = 5e8
"""Gradients that DeepSpeed reduces at once: reduce_bucket_size."""
LIVE = 1e9
"""Weights that ZeRO-3 keeps gathered: stage3_max_live_parameters."""
PREFETCHED = 5e7
"""Weights that ZeRO-3 gathers ahead: stage3_prefetch_bucket_size."""


@dataclass(frozen=True)
class Part:
    """What a model holds in a phase."""

    model: str
    kind: str
    """weights, gradients, optimiser, activations, logits, KV cache, gathered weights, buffers, heap.

    The heap is what glibc's malloc keeps on a CPU beside what is in use.
    """
    bytes: float
    on_host: bool = False


Moment = tuple[Part, ...]
"""All that a rank holds at one time."""


@dataclass(frozen=True)
class EngineMemory:
    """What DeepSpeed's engine of one model holds on one rank."""

    model: PlannedModel
    hardware: Hardware
    data_ranks: int
    accumulates: bool
    """Whether an optimiser step has several micro-batches."""
    stages: int = 1
    """Ranks that share the layers, one as many as another."""

    @property
    def _stage(self) -> int:
        return self.model.spec.zero_stage

    @property
    def _share(self) -> float:
        """A rank's share of what ZeRO shards."""
        return 1 / self.data_ranks

    @property
    def _weights(self) -> float:
        """Weights of this rank before ZeRO shards them."""
        return self._of_rank(self.model.counts.whole, self.model.counts.linear)

    @property
    def _trained(self) -> float:
        return self._of_rank(self.model.counts.trained, self.model.counts.linear - self.model.counts.packed)

    def _of_rank(self, number: int, linear: int) -> float:
        """What tensor ranks and stages leave this rank; of linear layers each has a part, all else whole."""
        ranks = self.model.tensor_ranks
        return (number - linear + linear / ranks) / self.stages

    @property
    def _is_low(self) -> bool:
        """Whether weights are in 16 bits, and the optimiser has a copy in fp32."""
        return self.model.element < 4

    def _part(self, kind: str, bytes: float, *, on_host: bool = False) -> Part:
        return Part(self.model.spec.name, kind, bytes, on_host)

    @property
    def whole_bytes(self) -> float:
        """Bytes of all weights in the model's precision."""
        return self._weights * self.model.element - self._packed / self.model.tensor_ranks

    @property
    def _packed(self) -> float:
        """Bytes that --load_in_4bit saves."""
        packed = self.model.counts.packed / self.stages if self.model.spec.load_in_4bit else 0
        return packed * (self.model.element - 0.53)

    @property
    def file_bytes(self) -> float:
        """Bytes of the weights before tensor ranks share them, as they are read and written."""
        return self.model.counts.whole / self.stages * self.model.element - self._packed

    def standing(self, *, in_use: bool = True) -> Moment:
        """What is there from the first optimiser step on. A frozen model may rest on the host unless used."""
        spec, element, whole = self.model.spec, self.model.element, self.whole_bytes
        if self._stage == 3:
            persistent = self.model.counts.persistent * element
            whole = (whole - persistent) * self._share + persistent
        if not spec.trained:
            return (self._part("weights", whole, on_host=spec.offload and (self._stage == 3 or not in_use)),)
        if self.hardware.is_cpu and self.model.tensor_ranks > 1:
            # The file is mapped as long as a whole parameter lies in it. A rank has read the pages of its
            # part of a column, and all pages of a row.
            whole += self.model.counts.linear * element * (1 + 1 / self.model.tensor_ranks) / 2
        weights = self._part("weights", whole, on_host=spec.offload and self._stage == 3)
        share = self._share if self._stage else 1.0
        master = 4 if self._is_low or self._stage else 0
        gradients = 0.0
        if spec.offload:
            gradients = 4 + (element if self._stage < 3 and self.accumulates else 0)
        elif self._stage == 3:
            gradients = element
        return (
            weights,
            self._part("optimiser", (master + 8) * self._trained * share, on_host=spec.offload),
            self._part("gradients", gradients * self._trained * share, on_host=spec.offload),
            *(self._bucket() if self._stage == 3 else self._passed_on() if spec.offload else ()),
        )

    def _passed_on(self) -> Moment:
        """Buffers on the host and on the device in which ZeRO-1 and 2 offload gradients, one by one."""
        size = self.model.largest * self.model.element
        return self._part("buffers", size, on_host=True), self._part("buffers", size)

    def gathered(self) -> Moment:
        """What ZeRO-3 gathers for a pass."""
        if self._stage < 3 or (self.data_ranks == 1 and not self.model.spec.offload):
            return ()
        gathered = min(self._weights, LIVE + PREFETCHED)
        return (self._part("gathered weights", gathered * self.model.element),)

    def _bucket(self) -> Moment:
        """Buffers in which gradients are reduced. On a CPU what is not written to takes no memory."""
        size = min(self._trained, BUCKET) if self.hardware.is_cpu else BUCKET
        number = 1 if self.hardware.is_cpu or self._stage == 3 else 2
        return (self._part("buffers", number * size * self.model.element),)

    def top_of_backward(self) -> Moment:
        """Beside activations: buffers, gathered weights, and gradients of earlier micro-batches."""
        kept = {0: 1.0, 1: self._share, 2: self._share, 3: 0.0}[self._stage] if self.accumulates else 0.0
        gradients = self._part("gradients", kept * self._trained * self.model.element)
        return (gradients, *(self._bucket() if self._stage in (1, 2) else self.gathered()))

    def end_of_backward(self) -> Moment:
        """Gradients as they are reduced, without activations."""
        element, trained = self.model.element, self._trained
        if self._stage == 0:
            flat = self._part("buffers", min(trained, BUCKET) * element)
            return (self._part("gradients", trained * element), flat)
        if self._stage < 3:
            return (self._part("gradients", self._share * trained * element), *self._bucket())
        copies = (2 if self.hardware.is_cpu else 1) * min(trained, BUCKET)  # flat, and Gloo's own
        return (self._part("gradients", copies * element), *self.gathered())

    def optimizer_step(self) -> Moment:
        """Gradients as the optimiser takes them."""
        wide = 4 if self._is_low else 0
        number = self.model.element + wide
        if self.model.spec.offload:
            number = 0
        elif self._stage in (1, 2):
            number += self.model.element
        share = self._share if self._stage else 1.0
        return (self._part("gradients", number * self._trained * share),)

    def building(self) -> Moment:
        """The engine at the worst moment of its construction."""
        if not self.model.spec.trained:
            return self.standing()
        if self._stage == 0:
            return (*self.standing(), *(self.optimizer_step() if self._is_low else ()))
        weights, optimiser, *others = self.standing()
        # One set of zeros in place of Adam's two averages, which the first step makes.
        return (weights, *others, replace(optimiser, bytes=8 / 12 * optimiser.bytes))


def total(moment: Iterable[Part], *, on_host: bool = False) -> float:
    """Bytes on the device, or those that a rank has put on the host."""
    return sum(part.bytes for part in moment if part.on_host == on_host)
