"""Loaders: which rows form a batch, in which order, on which rank.

Batches hold rows of similar length, to save padding. What an optimiser step holds depends on the seed and on
the number of rows in a step only, never on how ranks, micro-batches and accumulation divide it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Generic, TypeVar

import numpy as np

from dschat.data.collate import PromptBatch, collate_prompts, collate_text
from dschat.data.rows import Rows
from dschat.data.splits import number_among_equals
from dschat.data.token_batch import TokenBatch
from dschat.data.token_budget import TokenBudget
from dschat.errors import UserError

WINDOW = 50
"""Steps whose rows are sorted by length together: enough to find company, few enough to stay random."""

Collate = Callable[..., Any]
"""(rows: pa.Table, num_rows, denominator) -> batch; `dschat.data.collate` with the pad id filled in."""

MicroBatch = TypeVar("MicroBatch")


@dataclass(frozen=True)
class OptimizerStep(Generic[MicroBatch]):
    """What one rank reads in one optimiser step."""

    micro_batches: list[MicroBatch]
    """As many on every rank."""
    denominator: float
    """What the step's loss is divided by: the tokens or the weights of all micro-batches of all ranks."""


@dataclass(frozen=True)
class TrainLoader:
    """One rank's optimiser steps: endlessly one epoch after the other, each in an order of its own."""

    dataset: Rows
    collate: Collate
    batch_size: int
    accumulation_steps: int
    rank: int
    world_size: int
    seed: int
    lengths: np.ndarray
    weights: np.ndarray
    """What each row adds to its optimiser step's denominator."""
    budget: TokenBudget | None = None
    """What divides a rank's rows of a step into micro-batches, in place of `batch_size`."""

    @property
    def step_size(self) -> int:
        """Rows of an optimiser step, over all ranks and micro-batches."""
        return self.batch_size * self.accumulation_steps * self.world_size

    def num_steps_of(self, num_epochs: float) -> int:
        """Optimiser steps of so many epochs, the last of which may be a part of one."""
        return _rounded_up(num_epochs * self.steps_per_epoch)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return -(-len(self.dataset) // self.step_size)

    def __len__(self) -> int:
        """Micro-batches of the first epoch on this rank."""
        if self.budget is None:
            return self.steps_per_epoch * self.accumulation_steps
        return sum(len(indices) for indices, _ in self._steps_of(0, 0))

    def steps_after(self, num_done: int) -> Iterator[OptimizerStep]:
        """The optimiser steps of a run that has taken so many; earlier ones are not read."""
        first_epoch, num_done = divmod(num_done, self.steps_per_epoch)
        for epoch in count(first_epoch):
            for indices, denominator in self._steps_of(epoch, num_done):
                yield OptimizerStep([self._collated(mine, denominator) for mine in indices], denominator)
            num_done = 0

    def __iter__(self) -> Iterator[Any]:
        """The micro-batches of the first epoch."""
        return (batch for _, batch in self.indexed_batches())

    def indexed_batches(self) -> Iterator[tuple[np.ndarray, Any]]:
        """Each micro-batch of the first epoch after its examples' indices, which fillers do not have."""
        for indices, denominator in self._steps_of(0, 0):
            for mine in indices:
                yield mine, self._collated(mine, denominator)

    def _steps_of(self, epoch: int, num_done: int) -> Iterator[tuple[list[np.ndarray], float]]:
        """The indices of this rank's micro-batches in each step of an epoch, and the step's denominator."""
        steps = step_indices(self.lengths, self.step_size, _generator(self.seed, epoch))
        deal = (self.batch_size, self.accumulation_steps, self.rank, self.world_size)
        for step in steps[num_done:]:
            if self.budget is None:
                indices = list(_dealt(step, *deal))
            else:
                indices = self.budget.divided(step, self.world_size)[self.rank]
            yield indices, float(self.weights[step].sum(dtype=np.float64))

    def _collated(self, indices: np.ndarray, denominator: float) -> Any:
        num_rows = self.batch_size if self.budget is None else max(1, len(indices))
        return self.collate(self.dataset[indices], num_rows, denominator)


@dataclass(frozen=True)
class EvalLoader:
    """One rank's evaluation batches, the same number on every rank."""

    dataset: Rows
    collate: Collate
    batch_size: int
    rank: int
    world_size: int
    order: np.ndarray

    def __len__(self) -> int:
        return -(-len(self.order) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Any]:
        return (batch for _, batch in self.indexed_batches())

    def indexed_batches(self) -> Iterator[tuple[np.ndarray, Any]]:
        """Each batch after its examples' indices, which fillers do not have."""
        for mine in _dealt(self.order, self.batch_size, len(self), self.rank, self.world_size):
            yield mine, self.collate(self.dataset[mine], self.batch_size, 1.0)


@dataclass(frozen=True)
class PromptLoader:
    """One rank's prompts for each PPO step: one endless stream of shuffled epochs, cut into steps.

    Each prompt stands in its step as often as it is to be answered. Batches are counted in answers. A prompt
    of several rows is one of the stream for each row, with samples of its own.
    """

    dataset: Rows
    pad_id: int
    batch_size: int
    batches_per_step: int
    rank: int
    world_size: int
    seed: int
    num_epochs: float
    lengths: np.ndarray
    number_among_equals: np.ndarray
    """How many rows before each have the same tokens,"""
    num_equals: np.ndarray
    """and how many rows there are of those: such rows are further samples of one prompt."""
    samples_per_prompt: int = 1
    multiple_of: int = 1
    """Widths of batches are multiples of it."""

    @property
    def step_size(self) -> int:
        """Answers of a PPO step, over all ranks."""
        return self.batch_size * self.batches_per_step * self.world_size

    def __len__(self) -> int:
        """PPO steps; the last takes prompts of one more epoch where it needs them to be full."""
        return _rounded_up(self.num_epochs * len(self.dataset) * self.samples_per_prompt / self.step_size)

    def __iter__(self) -> Iterator[list[PromptBatch]]:
        return self.steps_after(0)

    def steps_after(self, num_done: int) -> Iterator[list[PromptBatch]]:
        """The prompts of the PPO steps that are left; those of the first `num_done` are not read."""
        times = self.samples_per_prompt
        stream = _shuffled_epochs(len(self.dataset), self.step_size // times, self.seed)
        for prompts, epochs in islice(stream, num_done, len(self)):
            rows = prompts.repeat(times)
            rounds = epochs * self.num_equals[prompts] + self.number_among_equals[prompts]
            samples = rounds.repeat(times) * times + np.tile(np.arange(times), len(prompts))
            order = _longest_first(np.arange(len(rows)), self.lengths[rows])
            yield [
                collate_prompts(
                    self.dataset[rows[mine]],
                    len(mine),
                    pad_id=self.pad_id,
                    multiple_of=self.multiple_of,
                    numbers=rows[mine],
                    samples=samples[mine],
                )
                for mine in _dealt(order, self.batch_size, self.batches_per_step, self.rank, self.world_size)
            ]


@dataclass(frozen=True)
class TextLoader:
    """One rank's optimiser steps over blocks of text, without end."""

    blocks: np.ndarray
    """[N, L + 1] token ids: L of a block are read, and the last is predicted only."""
    batch_size: int
    accumulation_steps: int
    rank: int
    world_size: int
    seed: int

    @property
    def step_size(self) -> int:
        """Blocks of an optimiser step, over all ranks and micro-batches."""
        return self.batch_size * self.accumulation_steps * self.world_size

    @property
    def num_targets(self) -> int:
        """Tokens of an optimiser step that are predicted: all but each block's first."""
        return self.step_size * (self.blocks.shape[1] - 1)

    def __iter__(self) -> Iterator[OptimizerStep[TokenBatch]]:
        return self.steps_after(0)

    def steps_after(self, num_done: int) -> Iterator[OptimizerStep[TokenBatch]]:
        """The optimiser steps of a run that has taken so many; the denominator is `num_targets`."""
        stream = _shuffled_epochs(len(self.blocks), self.step_size, self.seed)
        deal = (self.batch_size, self.accumulation_steps, self.rank, self.world_size)
        for indices, _ in islice(stream, num_done, None):
            blocks = [collate_text(self.blocks[mine]) for mine in _dealt(indices, *deal)]
            yield OptimizerStep(blocks, float(self.num_targets))


def build_train_loader(
    dataset: Rows,
    collate: Collate,
    *,
    batch_size: int,
    accumulation_steps: int,
    rank: int,
    world_size: int,
    seed: int,
    max_tokens: int = 0,
    num_sharing: int = 1,
) -> TrainLoader:
    """Batches of `batch_size` rows of similar length; each row once an epoch, fillers in the last step.

    With `max_tokens` the same steps are divided into batches of at most so many tokens, padding included, for
    each of the `num_sharing` ranks that share the tokens of rows.

    A batch's denominator is the sum of the optimiser step's num_targets, or weights, or without these columns
    its rows.
    """
    counted = next((name for name in ("num_targets", "weight") if name in dataset.table.column_names), None)
    lengths = dataset.column("length")
    return TrainLoader(
        dataset=dataset,
        collate=collate,
        batch_size=batch_size,
        accumulation_steps=accumulation_steps,
        rank=rank,
        world_size=world_size,
        seed=seed,
        lengths=lengths,
        weights=dataset.column(counted) if counted else np.ones(len(lengths)),
        budget=TokenBudget.of(dataset, max_tokens, num_sharing) if max_tokens else None,
    )


def build_eval_loader(
    dataset: Rows, collate: Collate, *, batch_size: int, rank: int, world_size: int, num_batches: int = 0
) -> EvalLoader:
    """Every row once over all ranks, the longest first; or as many as fill `num_batches` global batches.

    Those are a random sample, the same one each time. The batches' denominators are 1.
    """
    rows = np.arange(len(dataset))
    if num_batches > 0:
        rows = _generator(0, 0).permutation(rows)[: num_batches * batch_size * world_size]
    order = _longest_first(rows, dataset.column("length"))
    return EvalLoader(dataset, collate, batch_size, rank, world_size, order)


def build_prompt_loader(
    dataset: Rows,
    *,
    pad_id: int,
    batch_size: int,
    batches_per_step: int,
    rank: int,
    world_size: int,
    seed: int,
    num_epochs: float = 1,
    samples_per_prompt: int = 1,
    multiple_of: int = 1,
) -> PromptLoader:
    """For each PPO step the `batches_per_step` batches of this rank, always full.

    Raises `UserError` where a step of all ranks cannot hold whole groups of `samples_per_prompt` answers.
    """
    num_answers = batch_size * batches_per_step * world_size
    if num_answers % samples_per_prompt:
        raise UserError(
            f"a PPO step samples {num_answers} answers (--per_device_generation_batch_size times "
            f"--generation_batches times ranks), which --num_samples_per_prompt {samples_per_prompt} does "
            "not divide; change one of them."
        )
    keys = dataset.column("key")
    _, group, group_sizes = np.unique(keys, return_inverse=True, return_counts=True)
    return PromptLoader(
        dataset=dataset,
        pad_id=pad_id,
        batch_size=batch_size,
        batches_per_step=batches_per_step,
        rank=rank,
        world_size=world_size,
        seed=seed,
        num_epochs=num_epochs,
        lengths=dataset.column("length"),
        number_among_equals=number_among_equals(keys),
        num_equals=group_sizes[group],
        samples_per_prompt=samples_per_prompt,
        multiple_of=multiple_of,
    )


def build_eval_prompts(
    dataset: Rows,
    *,
    num_prompts: int,
    pad_id: int,
    batch_size: int,
    rank: int,
    world_size: int,
    samples_per_prompt: int = 1,
    multiple_of: int = 1,
) -> list[PromptBatch]:
    """This rank's batches of `num_prompts` prompts (of all, where there are fewer), the longest first.

    They are a random sample, the same one each time, and each stands there as often as it is to be answered.
    Every rank has as many batches of as many rows: fillers complete them.
    """
    lengths = dataset.column("length")
    rows = _longest_first(_generator(0, 0).permutation(len(dataset))[:num_prompts], lengths)
    samples = np.tile(np.arange(samples_per_prompt), len(rows))
    rows = rows.repeat(samples_per_prompt)
    size = min(batch_size, -(-len(rows) // world_size))
    num_batches = -(-len(rows) // (size * world_size))
    return [
        collate_prompts(
            dataset[rows[mine]],
            size,
            pad_id=pad_id,
            multiple_of=multiple_of,
            numbers=rows[mine],
            samples=samples[mine],
        )
        for mine in _dealt(np.arange(len(rows)), size, num_batches, rank, world_size)
    ]


def step_indices(lengths: np.ndarray, step_size: int, generator: np.random.Generator) -> list[np.ndarray]:
    """The examples of each optimiser step of an epoch, the longest first; the last step may lack some."""
    order = generator.permutation(len(lengths))
    whole, rest = np.split(order, [len(order) // step_size * step_size])
    steps: list[np.ndarray] = []
    for window in np.split(whole, range(WINDOW * step_size, len(whole), WINDOW * step_size)):
        steps.extend(_longest_first(window, lengths).reshape(-1, step_size))
    shuffled = [steps[i] for i in generator.permutation(len(steps))]
    return shuffled + ([_longest_first(rest, lengths)] if len(rest) else [])


def _rounded_up(number: float) -> int:
    """At least 1. What is over a whole number by the error of a product, as 0.1 * 30 is, is that number."""
    return max(1, math.ceil(number - 1e-9 * number))


def _longest_first(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return rows[np.argsort(-lengths[rows], kind="stable")]


def _dealt(
    rows: np.ndarray, batch_size: int, num_batches: int, rank: int, world_size: int
) -> Iterator[np.ndarray]:
    """This rank's share of each global batch; neighbours go to different ranks at the same time."""
    global_size = batch_size * world_size
    for start in range(0, num_batches * global_size, global_size):
        yield rows[start : start + global_size][rank::world_size]


def _shuffled_epochs(num_rows: int, size: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endlessly the next `size` rows of one shuffled epoch after the other, and the epoch each belongs to."""
    rows, epochs, epoch = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), 0
    while True:
        while len(rows) < size:
            rows = np.append(rows, _generator(seed, epoch).permutation(num_rows))
            epochs = np.append(epochs, np.full(num_rows, epoch))
            epoch += 1
        yield rows[:size], epochs[:size]
        rows, epochs = rows[size:], epochs[size:]


def _generator(seed: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng([seed % 2**64, epoch])
