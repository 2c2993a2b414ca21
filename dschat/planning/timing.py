"""Seconds of a run by phase, from those of its models' passes."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from dschat.arguments import PassSizes, RunArguments
from dschat.distributed.mesh import mesh
from dschat.planning.memory import MemoryModel
from dschat.planning.meta_pass import Rows
from dschat.planning.models import PlannedModel
from dschat.planning.slices import Seconds, Slices, key_of
from dschat.runs.measured_choices import MeasuredChoices

WRITTEN = 8
"""Tokens that a slice writes."""


@dataclass(frozen=True)
class Timing:
    """The times of one device, which does its share of every phase."""

    memory: MemoryModel
    of_models: Mapping[str, Seconds]
    """Those of `Slices.seconds`, by the models' names."""
    share: float
    """Tokens of a row of the run for each one of the rows that were timed."""
    prompts: int
    """Tokens of the prompts that were timed."""

    @staticmethod
    def of(
        memory: MemoryModel,
        timed: PassSizes,
        run: RunArguments,
        choices: MeasuredChoices,
        *,
        mean_length: float | None,
        slices: Slices | None,
    ) -> "Timing | None":
        """The times of passes over rows of `timed`, as the machine remembers them, or as `slices` finds them.

        They are those of as many ranks of data as the run has, or else of one, without what ranks send.
        `mean_length` is that of the run's rows in tokens, padding included, where it is known. None where
        something is not remembered and there are no slices. Every rank must call it.
        """
        rows = Rows(timed.train_rows, timed.length, timed.num_outputs)
        # Tokens follow in the middle of the answers, where the cache has its mean width.
        middle = timed.length - timed.answer_length // 2
        found: dict[str, Seconds] = {}
        for model in memory.models:
            alike = _trained_like(model, memory)
            if alike.spec.name not in found:
                samples = alike is memory.models[0] and timed.answer_length
                prompts = Rows(timed.generation_rows, middle, WRITTEN) if samples else None
                for ranks in dict.fromkeys((memory.data_ranks, 1)):
                    measuring = slices if ranks == mesh().data.size else None
                    seconds = choices.kept_numbers(
                        "seconds of a slice",
                        partial(measuring.seconds, alike, rows, prompts) if measuring else None,
                        key=key_of(alike, rows, prompts, run, ranks=ranks),
                    )
                    if seconds is not None:
                        break
                else:
                    return None
                if alike.spec.trained and alike.spec.zero_stage and ranks == 1:  # it steps over all weights
                    seconds["optimizer"] /= memory.data_ranks
                found[alike.spec.name] = seconds
            found[model.spec.name] = found[alike.spec.name]
        share = (mean_length or timed.length) / timed.length
        return Timing(memory, found, share, middle)

    def step_seconds(self) -> Seconds:
        """Seconds of an optimiser step, of step 3 of a PPO step, by phase."""
        memory, sizes = self.memory, self.memory.sizes
        trained = [model for model in memory.models if model.spec.trained]
        stepping = sum(map(self._optimizer, trained))
        learning = sum(self._pass(model, "forward_backward") for model in trained)
        if not sizes.answer_length:
            turns = (sizes.accumulation + memory.stages - 1) / memory.stages
            return {"forward_backward": turns * learning, "optimizer": stepping}
        micro_batches = sizes.rollout_rows / sizes.train_rows
        reading = sum(self._pass(model, "forward") for model in memory.models)
        updates = sizes.passes * micro_batches / sizes.accumulation
        actor = self.of_models[memory.models[0].spec.name]
        writing = sizes.answer_length * actor["writing"] / memory.models[0].tensor_ranks
        prompt = (sizes.length - sizes.answer_length) / self.prompts
        read = prompt * actor["reading"] / memory.models[0].tensor_ranks
        return {
            "generation": sizes.rollout_rows / sizes.generation_rows * (read + writing),
            "experience": micro_batches * reading,
            "training": sizes.passes * micro_batches * learning + updates * stepping,
        }

    def _pass(self, model: PlannedModel, phase: str) -> float:
        return self.share * self.of_models[model.spec.name][phase] / model.tensor_ranks

    def _optimizer(self, model: PlannedModel) -> float:
        return self.of_models[model.spec.name]["optimizer"] / model.tensor_ranks / self.memory.stages


def _trained_like(model: PlannedModel, memory: MemoryModel) -> PlannedModel:
    """A trained model of the same modules, whose passes without gradients take as long; else the model."""
    same = (m for m in memory.models if m.spec.trained and m.structure == model.structure)
    return next(same, model)
