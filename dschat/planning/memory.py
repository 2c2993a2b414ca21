"""The bytes that a rank holds in each phase of a run, by model and by part.

What DeepSpeed 0.19.8 holds at each ZeRO stage was counted by following every allocation of an engine through
two optimiser steps (docs/hardware.md says how); `EngineMemory` has these numbers per weight.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf

from dschat.arguments import PassSizes
from dschat.distributed.device import KEPT_SHARE
from dschat.distributed.heap import LARGE
from dschat.planning.hardware import Hardware
from dschat.planning.meta_pass import Rows
from dschat.planning.models import PlannedModel

BUCKET = 5e8
"""Gradients that DeepSpeed reduces at once: reduce_bucket_size."""
LIVE = 1e9
"""Weights that ZeRO-3 keeps gathered: stage3_max_live_parameters."""
PREFETCHED = 5e7
"""Weights that ZeRO-3 gathers ahead: stage3_prefetch_bucket_size."""
ROUND = 32
"""A KV cache has a multiple of so many columns, as in rlhf/rollout/decode_cache.py."""
DRAWN = 16
"""Bytes per entry of the vocabulary and row while a token is drawn."""
REUSED = 0.5
"""The share of what the C library's heap has free between blocks in use where new ones find room: a freed
block is too small for the next aligned one of its size (glibc's bug 14581), two neighbours hold one."""
LIBRARIES = {"cpu": 20e6, "cuda": 3 * 2**25}
"""Bytes that libraries take on their first use: most of it pages of oneDNN's code, as a run of 6 million
weights took; on a GPU cuBLAS's workspaces of forward and backward passes, and fp32 copies of some logits."""


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


def _in_heap(bytes_of: Callable[..., float]) -> float:
    """The bytes that come from the C library's heap of those that `bytes_of` counts in blocks `below` a size.

    It grows for small blocks alone, but gives large ones what room it has, so that the small ones need more.
    """
    return min(bytes_of(below=inf), bytes_of(below=LARGE) / REUSED)


def total(moment: Iterable[Part], *, on_host: bool = False) -> float:
    """Bytes on the device, or those that a rank has put on the host."""
    return sum(part.bytes for part in moment if part.on_host == on_host)


@dataclass(frozen=True)
class MemoryModel:
    """A run's models on one rank, and what its passes read."""

    models: Sequence[PlannedModel]
    sizes: PassSizes
    hardware: Hardware
    data_ranks: int
    stages: int = 1
    """Ranks that share a model's layers. The first keeps as many micro-batches as there are stages, each of
    its layers alone: activations of one whole pass."""

    def _engine(self, model: PlannedModel) -> EngineMemory:
        return EngineMemory(model, self.hardware, self.data_ranks, self.sizes.accumulation > 1, self.stages)

    def phases(self) -> dict[str, Moment]:
        """The worst moment of each phase."""
        moments = {
            "load": self._loading(),
            "generate": self._generating(),
            "experience": self._reading(),
            "train": self._training(),
            "evaluate": self._evaluating(),
            "save": self._saving(),
        }
        on_cpu = self.hardware.is_cpu
        base = Part("libraries", "buffers", LIBRARIES[self.hardware.device])
        return {
            name: max(
                ((base, *moment) for moment in found),
                key=lambda moment: total(moment) + (total(moment, on_host=True) if on_cpu else 0),
            )
            for name, found in moments.items()
            if found
        }

    def _standing(self, *used: PlannedModel) -> Moment:
        """What all models hold; frozen ones that are not `used` may rest on the host."""
        together = self.models
        if self.sizes.answer_length == 0:  # DPO's reference is gone before the policy comes
            together = [model for model in self.models if model.spec.trained] if not used else list(used)
        parts = [p for m in together for p in self._engine(m).standing(in_use=m in used)]
        if self.sizes.keeps_average:
            average = 4 * self.models[0].counts.trained / self.models[0].tensor_ranks
            share = 1 / self.data_ranks if self.models[0].spec.zero_stage == 3 else 1.0
            parts.append(Part("moving average", "weights", average * share))
        return tuple(parts)

    def _pass(self, model: PlannedModel, rows: Rows, *, trains: bool) -> Moment:
        shape, ranks = model.shape(rows, trains=trains), model.tensor_ranks
        logits = (2 if trains else 1) * shape.logits.size(rows) if shape.logits else 0.0
        # Of a tensor-parallel layer the parts between its two products are shared out, about half of it.
        share = 1.0 if ranks == 1 else (1 + 1 / ranks) / 2
        return (
            Part(model.spec.name, "activations", max(shape.peak(rows) - logits, 0.0) * share),
            Part(model.spec.name, "heap", self._holes(model, rows) * share if trains else 0.0),
            Part(model.spec.name, "logits", logits),
        )

    def _holes(self, model: PlannedModel, rows: Rows) -> float:
        """On a CPU: what a forward pass leaves free in the heap between activations."""
        found = (1 - REUSED) * _in_heap(partial(model.shape(rows, trains=True).freed, rows))
        if self.sizes.accumulation > 1:  # gradients stand among what the micro-batch before left
            found += (1 - REUSED) * (found + self._kept_in_heap(model, rows))
        return found if self.hardware.is_cpu else 0.0

    def _kept_in_heap(self, model: PlannedModel, rows: Rows) -> float:
        return _in_heap(partial(model.shape(rows, trains=True).kept, rows)) if self.hardware.is_cpu else 0.0

    def _left(self, model: PlannedModel, rows: Rows) -> Moment:
        """What the heap has free on a CPU after the backward pass."""
        found = self._holes(model, rows) + self._kept_in_heap(model, rows)
        return (Part(model.spec.name, "heap", found),)

    def _rows(self, number: int) -> Rows:
        return Rows(number, self.sizes.length, self.sizes.num_outputs)

    @property
    def _mapped_by(self) -> int:
        """Ranks of a host that share what is there once; on a CPU the plan is that of rank 0."""
        return 1 if self.hardware.is_cpu else min(self.hardware.ranks, self.hardware.ranks_per_host)

    def _loading(self) -> list[Moment]:
        """Models come one after the other; the file that is read is mapped, once per host, beside its copy.

        At ZeRO-3 a GPU holds its shard from the start.
        """
        found: list[Moment] = []
        before: Moment = ()
        on_cpu = self.hardware.is_cpu
        for model in self.models:
            engine = self._engine(model)
            read = Part(model.spec.name, "buffers", engine.file_bytes / self._mapped_by, on_host=not on_cpu)
            weights = Part(model.spec.name, "weights", engine.file_bytes)
            if model.spec.zero_stage == 3 and not on_cpu:
                weights = engine.standing()[0]
            found += [(*before, read, weights), (*before, *engine.building())]
            if self.sizes.answer_length:
                before = (*before, *engine.standing(in_use=False))
        return found

    @property
    def _cache(self) -> Part:
        """Keys and values of the answers that are sampled at once."""
        actor, columns = self.models[0], -(-self.sizes.length // ROUND) * ROUND
        numbers = self.sizes.generation_rows * columns * actor.cache_width
        return Part(actor.spec.name, "KV cache", numbers * actor.element / actor.tensor_ranks)

    @property
    def _kept(self) -> Moment:
        """On a GPU: the keys and values, which stay between rollouts with the graphs that were captured."""
        most = KEPT_SHARE * (self.hardware.device_memory or inf)
        samples_on_gpu = self.sizes.answer_length > 0 and not self.hardware.is_cpu
        return (self._cache,) if samples_on_gpu and self._cache.bytes <= most else ()

    def _generating(self) -> list[Moment]:
        if not self.sizes.answer_length:
            return []
        actor, sizes = self.models[0], self.sizes
        engine, rows = self._engine(actor), sizes.generation_rows
        vocabulary = getattr(actor.config, "vocab_size", 0)
        gathered: Moment = ()
        if actor.spec.zero_stage == 3 and self.data_ranks > 1:
            whole = Part(actor.spec.name, "gathered weights", engine.whole_bytes)
            needed = total((*self._standing(), whole, whole))  # twice, as rollout/hf_generate.py asks for
            fits = not self.hardware.usable or needed <= self.hardware.usable
            is_whole = fits if sizes.gather == "auto" else sizes.gather == "always"
            gathered = (whole,) if is_whole else engine.gathered()
        standing = (*self._standing(), *gathered, self._cache)
        read = Rows(rows, max(sizes.length - sizes.answer_length, 1), 1)
        return [
            (*standing, Part(actor.spec.name, "logits", rows * vocabulary * DRAWN)),
            (*standing, *self._pass(actor, read, trains=False)),
        ]

    def _reading(self) -> list[Moment]:
        """Passes without gradients over what is then learned from."""
        if not self.sizes.answer_length and len(self.models) == 1:
            return []
        found = []
        for model in self.models:
            if self.sizes.answer_length or not model.spec.trained:
                passed = self._pass(model, self._rows(self.sizes.train_rows), trains=False)
                gathered = self._engine(model).gathered()
                found.append((*self._standing(model), *self._kept, *gathered, *passed))
        return found

    def _training(self) -> list[Moment]:
        found: list[Moment] = []
        trained = [model for model in self.models if model.spec.trained]
        rows = self._rows(self.sizes.train_rows)
        held: Moment = ()
        if self.sizes.holds_both and len(trained) > 1:
            saved = trained[1].shape(rows, trains=True).kept(rows)
            held = (Part(trained[1].spec.name, "activations", saved),)
        for model in trained:
            engine = self._engine(model)
            standing = (*self._standing(), *self._kept)
            passed = self._pass(model, rows, trains=True)
            passed = (*passed, *(held if model is trained[0] else ()))
            ends = (engine.end_of_backward(), engine.optimizer_step())
            # Batches of shorter rows have smaller blocks, of which more come from the heap.
            length = rows.length * 3 // 4
            shorter = replace(rows, length=length, outputs=min(rows.outputs, length))
            left = max((self._left(model, each) for each in (rows, shorter)), key=total)
            found.append((*standing, *engine.top_of_backward(), *passed))
            found += [(*standing, *end, *left) for end in ends]
        return found

    def _evaluating(self) -> list[Moment]:
        if not self.sizes.eval_rows:
            return []
        model = self.models[0]
        passed = self._pass(model, self._rows(self.sizes.eval_rows), trains=False)
        return [(*self._standing(), *self._engine(model).gathered(), *passed)]

    def _saving(self) -> list[Moment]:
        """Rank 0 writes a whole copy, and reads it back."""
        found = []
        for model in self.models:
            if model.spec.trained:
                size = 2 * self._engine(model).file_bytes * self.stages / self._mapped_by
                copies = Part(model.spec.name, "buffers", size, on_host=not self.hardware.is_cpu)
                found.append((*self._standing(), copies))
        return found
