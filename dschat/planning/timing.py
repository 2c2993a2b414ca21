"""Seconds of a run by phase, from what its passes compute and move and how fast the device does both."""

from dataclasses import dataclass

from dschat.planning.memory import MemoryModel
from dschat.planning.meta_pass import PassCost, Rows
from dschat.planning.models import PlannedModel
from dschat.planning.rates import Rates

MADE_TWICE = 3
"""AdamW reads and writes about as much per weight as three passes over the weights of ZeRO's copies."""


@dataclass(frozen=True)
class Timing:
    """The times of one device, which does its share of every phase."""

    memory: MemoryModel
    rates: Rates

    def step_seconds(self) -> dict[str, float]:
        """Seconds of an optimiser step, of step 3 of a PPO step, by phase."""
        memory, sizes = self.memory, self.memory.sizes
        trained = [model for model in memory.models if model.spec.trained]
        if not sizes.answer_length:
            turns = (sizes.accumulation + memory.stages - 1) / memory.stages
            passes = turns * self._pass(trained[0], trains=True)
            return {"forward_backward": passes, "optimizer": self._optimizer(trained[0])}
        micro_batches = sizes.rollout_rows / sizes.train_rows
        reading = sum(self._pass(model, trains=False) for model in memory.models)
        learning = sum(self._pass(model, trains=True) for model in trained)
        updates = sizes.passes * micro_batches / sizes.accumulation
        stepping = sum(map(self._optimizer, trained))
        return {
            "generation": sizes.rollout_rows / sizes.generation_rows * self._generation(memory.models[0]),
            "experience": micro_batches * reading,
            "training": sizes.passes * micro_batches * learning + updates * stepping,
        }

    def _seconds(self, cost: PassCost, model: PlannedModel) -> float:
        rates = self.rates
        return cost.seconds(
            flops_per_second=rates.flops_per_second * model.tensor_ranks,
            bytes_per_second=rates.bytes_per_second * model.tensor_ranks,
            overhead=rates.overhead,
        )

    def _pass(self, model: PlannedModel, *, trains: bool) -> float:
        sizes = self.memory.sizes
        rows = Rows(sizes.train_rows, sizes.length, sizes.num_outputs)
        return self._seconds(self.memory.cost_of(model, rows, trains=trains), model)

    def _optimizer(self, model: PlannedModel) -> float:
        """A step of AdamW over this rank's share."""
        share = 1 / self.memory.data_ranks if model.spec.zero_stage else 1.0
        trained = model.counts.trained / model.tensor_ranks / self.memory.stages
        return trained * (
            self.rates.seconds_per_weight * share + 4 * MADE_TWICE / self.rates.bytes_per_second
        )

    def _generation(self, model: PlannedModel) -> float:
        """One batch of answers: prompts are read once, then a token of every answer at a time."""
        sizes = self.memory.sizes
        prompt = max(sizes.length - sizes.answer_length, 1)
        rows = sizes.generation_rows
        reading = self.memory.cost_of(model, Rows(rows, prompt, 1), trains=False)
        token = self.memory.cost_of(model, Rows(rows, 1, 1), trains=False)
        columns = prompt + sizes.answer_length / 2
        cache = rows * columns * model.cache_width * model.element / model.tensor_ranks
        each = self._seconds(token, model) + cache / self.rates.bytes_per_second
        return self._seconds(reading, model) + sizes.answer_length * each
