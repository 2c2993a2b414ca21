"""The speed of PPO steps."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from dschat.arguments import RlhfArguments
from dschat.engines.speed import SECONDS, SpeedReport, measured_peak
from dschat.rlhf.ppo_trainer import PPOTrainer
from dschat.rlhf.ppo_work import PpoWork
from dschat.runs.measured_choices import MeasuredChoices


class PpoSpeed:
    """Measures the PPO steps of one run."""

    def __init__(self, trainer: PPOTrainer, args: RlhfArguments, choices: MeasuredChoices) -> None:
        self._trainer, self._work = trainer, PpoWork(trainer.engine, args.ppo)
        length = args.rollout.max_prompt_seq_len + args.rollout.max_answer_seq_len
        config = trainer.engine.actor.module.config
        num_tokens = args.ppo.per_device_training_batch_size * length
        self._report = SpeedReport(
            measured_peak(config, args.run.dtype, num_tokens=num_tokens, choices=choices)
        )
        self._seconds_saving = 0.0
        self.print_now_and_then = self._report.print_now_and_then

    def figures(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics of speed of the PPO step that the trainer has just done, from its other metrics.

        The rates are of the time of its phases. `seconds_saving` is of the checkpoints since the step before.
        """
        experience = self._trainer.experience
        assert experience is not None, "a PPO step has experience"
        seconds = {
            name.removeprefix(SECONDS): value for name, value in metrics.items() if name.startswith(SECONDS)
        }
        flops = self._work.flops(
            experience.rollout,
            ppo_step=experience.ppo_step,
            share_of_updates=metrics["updates_done"] / self._trainer.updates_per_ppo_step,
        )
        tokens = experience.rollout.attention_mask.sum().item()
        seconds["saving"], self._seconds_saving = self._seconds_saving, 0.0
        return self._report.figures(tokens=tokens, flops=flops, seconds=seconds)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around what may write a checkpoint between PPO steps."""
        start = time.perf_counter()
        yield
        self._seconds_saving += time.perf_counter() - start
