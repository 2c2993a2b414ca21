"""A run of PPO at the end of a PPO step, from where the next one is taken again."""

from __future__ import annotations

from dschat.arguments import RlhfArguments
from dschat.console import messages
from dschat.distributed.device import current_device
from dschat.errors import UserError
from dschat.rlhf.train import Assembly
from dschat.runs.output_folder import without_infinities
from scripts.replay_record import Passes, Record, record_of


class Stage:
    """A trainer with these flags at the checkpoint of `run` that is loaded next.

    Every rank makes the same calls.
    """

    def __init__(self, run: Assembly, args: RlhfArguments, *, kl_coef: float | None = None) -> None:
        """`kl_coef` replaces the checkpoint's, which may have been steered since the beginning."""
        self._run, self._args = run, args
        self._trainer, self._evaluator = run.trainer_of(args), run.evaluator_of(args)
        state = run.checkpoints.load(run.engine.by_name)
        run.checkpoints.rewind()
        if kl_coef is not None:
            state.values["trainer"]["kl_coef"] = kl_coef
        state.restore(self._trainer.parts)
        if self._evaluator is not None:
            watched = state.values.get("watch", {})
            if "evaluator" in watched:
                self._evaluator.load_state_dict(watched["evaluator"])
            elif args.ppo.score_scale == "running":
                self._evaluator.evaluate()  # its scores are the scale of all later ones

    def go_to(self, done: int, *, comes_back: bool) -> int:
        """Take PPO steps until so many are done; returns how many that were.

        With `comes_back` a further `Stage` begins here, and not where this one began.
        """
        trainer, first = self._trainer, self._trainer.num_ppo_steps_done
        for step in range(first, done):
            messages.info(f"PPO step {step + 1}, on the way")
            self._take()
        if comes_back and (done > first or done == 0):
            number = trainer.num_updates
            kept = {"evaluator": self._evaluator.state_dict()} if self._evaluator else {}
            parts = {**trainer.parts_to_keep, "watch": kept}
            self._run.checkpoints.save(number, engines=trainer.engine.by_name, parts=parts)
            self._run.checkpoints.rewind()
        return done - first

    def step(self, number: int, *, is_evaluated: bool) -> Record:
        """Take PPO step `number`, from 1, and with `is_evaluated` the evaluation after it."""
        trainer = self._trainer
        if trainer.num_ppo_steps_done != number - 1:
            raise UserError(
                f"what the run was before PPO step {number} could not be kept, as the warning above says."
            )
        passes = Passes(trainer, self._args.ppo)
        metrics = self._take()
        if is_evaluated and self._evaluator is not None:
            metrics |= self._evaluator.evaluate(kl_coef=metrics["kl_coef"])
        return record_of(trainer, passes, self._args.ppo, without_infinities(metrics))

    def _take(self) -> dict[str, float]:
        done = self._trainer.num_ppo_steps_done
        prompts = next(self._run.prompts.steps_after(done))
        batches = [batch.to(current_device()) for batch in prompts]
        return self._trainer.step(batches, ppo_step=done)
