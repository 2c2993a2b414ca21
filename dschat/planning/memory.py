"""The bytes that a rank holds in each phase of a run, by model and by part."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf

from dschat.arguments import PassSizes
from dschat.distributed.device import KEPT_SHARE
from dschat.distributed.heap import LARGE
from dschat.planning.engine_memory import EngineMemory, Moment, Part, total
from dschat.planning.hardware import Hardware
from dschat.planning.meta_pass import Rows
from dschat.planning.models import PlannedModel

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


def _in_heap(bytes_of: Callable[..., float]) -> float:
    """The bytes that come from the C library's heap of those that `bytes_of` counts in blocks `below` a size.

    It grows for small blocks alone, but gives large ones what room it has, so that the small ones need more.
    """
    return min(bytes_of(below=inf), bytes_of(below=LARGE) / REUSED)


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

    def _split_by_gathers(self) -> Moment:
        """On a CPU: what small weights leave free in the heap, which ZeRO-3 gathers one by one over ranks.

        Each is a block that goes after its layer, and is no room for the next. Gloo makes a copy of it in a
        thread of its own, whose heap is another; all models use that.
        """
        if not self.hardware.is_cpu or self.data_ranks == 1:
            return ()
        passed = [model for model in self.models if model.spec.trained]
        passed += self.models[: self.sizes.answer_length > 0]  # the actor once more, for answers
        sizes = [model.counts.small * model.element for model in passed if model.spec.zero_stage == 3]
        return (Part("ZeRO-3", "heap", (1 - REUSED) * sum(sizes) + max(sizes, default=0)),)

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
            standing = (*self._standing(), *self._kept, *self._split_by_gathers())
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
