"""PPO in two verbs: make experience, learn from it. The mathematics: dschat/losses.py, docs/ppo.md."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice, repeat
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

from dschat.arguments import RlhfArguments
from dschat.checkpoints.tensor_record import TensorRecord
from dschat.console import messages
from dschat.data.collate import PromptBatch
from dschat.data.loaders import TextLoader
from dschat.data.token_batch import TokenBatch
from dschat.distributed.collectives import sum_across_ranks
from dschat.distributed.device import peak_memory_gib, synchronize
from dschat.distributed.mesh import mesh
from dschat.engines.memory_remedies import PhaseKind
from dschat.engines.out_of_memory import phase
from dschat.engines.skipped_steps import SkippedSteps
from dschat.engines.step import (
    DeepSpeedEngine,
    backward_on,
    gradient_norm,
    learning_rate,
    set_gradient_norm,
    skipped_because,
    take_steps_together,
    train_on,
)
from dschat.losses import clipped_value_loss, policy_ratio, text_loss
from dschat.models.forward import predictions_of, token_logprobs_of, values_of
from dschat.rlhf.actor_loss import actor_loss
from dschat.rlhf.analysis import AnswerAnalyzer
from dschat.rlhf.experience import (
    AnswerAnalysis,
    Experience,
    MicroBatch,
    Minibatch,
    MinibatchSampler,
    ScoreShaping,
)
from dschat.rlhf.kl_controller import KlController
from dschat.rlhf.position import Position
from dschat.rlhf.rewards.sources import Rewards
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.rlhf.rollout.agreement import RolloutCheck
from dschat.rlhf.rollout.batch import RolloutBatch, gather_rollouts
from dschat.rlhf.rollout.hf_generate import Rollout
from dschat.rlhf.running_statistics import RunningStatistics
from dschat.rlhf.tokenizers import RlhfTokenizers
from dschat.rlhf.update_statistics import UpdateStatistics


class DeepSpeedPPOTrainer:
    """`generate_experience(prompts)`, `train_rlhf(minibatch)` for each of its minibatches, `metrics()`.

    `score_scale` is the mean and standard deviation that scores are brought to 0 and 1 by. The data set of
    `prompts` is needed where the reward model has a tokenizer of its own (`tokenizers.own`) and where
    there are `rewards`, other sources of scores. `texts` are learned beside the answers.
    """

    def __init__(
        self,
        engine: DeepSpeedRLHFEngine,
        tokenizers: RlhfTokenizers,
        args: RlhfArguments,
        *,
        prompts: Dataset | None = None,
        score_scale: tuple[float, float] = (0.0, 1.0),
        rewards: Rewards | None = None,
        texts: TextLoader | None = None,
    ) -> None:
        tokenizer = tokenizers.actor
        self.engine = engine
        self._args = args
        self.rewards = rewards
        self._judges = AnswerAnalyzer(engine, tokenizers, args, prompts, rewards)
        self._pad_token_id = tokenizer.pad_token_id
        self._num_tokens = len(tokenizer)
        self._rollout = Rollout(
            engine.actor,
            tokenizer,
            args.rollout,
            seed=args.run.seed,
            records_logprobs=args.records_rollout_logprobs,
        )
        self._rollout_check: RolloutCheck | None = None
        if args.rollout_tolerance > 0:
            self._rollout_check = RolloutCheck(args.rollout_tolerance, args.rollout.rollout_on_mismatch)
        self.schedule = MinibatchSampler(
            micro_batch_size=args.ppo.per_device_training_batch_size,
            accumulation_steps=args.optimizer.gradient_accumulation_steps,
            world_size=mesh().data.size,
            rank=mesh().data.rank,
            seed=args.run.seed,
        )
        self._scores = RunningStatistics() if args.ppo.score_scale == "running" else None
        mean, std = score_scale if rewards is None else (0.0, 1.0)  # else it is for the model's part alone
        self.shaping = ScoreShaping(
            clip=args.ppo.reward_clip,
            missing_eos_penalty=args.ppo.missing_eos_penalty,
            mean=mean,
            std=std,
        )
        self._texts, self._text_steps = texts, iter(texts or ())
        self._moved: list[Tensor] = []  # approx_kl of the present optimiser step, a sum a micro-batch
        self._kl = KlController(args.ppo.kl_coef, args.ppo.kl_target, args.ppo.kl_horizon)
        self._at = Position()
        self._experience: Experience | None = None
        self._kept_rollout = TensorRecord(RolloutBatch)
        self._kept_judgement = TensorRecord(AnswerAnalysis)
        self._statistics = UpdateStatistics()
        self._skipped = SkippedSteps(args.run)
        self._told_of_nonfinite_scores = False
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        synchronize()
        self._seconds[phase] += time.perf_counter() - start

    def generate_experience(self, prompts: PromptBatch | list[PromptBatch]) -> Experience:
        """Answer this rank's prompts and judge the answers of all ranks. Every rank must call it.

        The ranks' prompts together are one rollout batch: the next PPO step. Raises `UserError` where the
        first answers fail the rollout check.
        """
        batches = prompts if isinstance(prompts, list) else [prompts]
        self._statistics, self._seconds = UpdateStatistics(), defaultdict(float)
        self._at.begin_ppo_step()
        rollout, judgement = self._checked(*self._answer_and_judge(batches), batches)
        judgement, self._at.nonfinite_scores = judgement.with_finite_scores()
        self._tell_of_nonfinite_scores(judgement)
        with self._timed("experience"):
            self._experience = Experience.build(
                rollout,
                judgement,
                self._args.ppo,
                self.schedule,
                self._shaping_of(judgement.scores),
                ppo_step=self._at.ppo_step,
                kl_coef=self._kl.coef,
            )
        if self._actor_learns:  # while it waits, KL says nothing of the coefficient
            self._kl.update(self._experience.kl.item(), len(judgement.scores))
        self._at.ppo_step += 1
        return self._experience

    @phase(PhaseKind.SAMPLING)
    def answer(self, prompts: list[PromptBatch], *, ppo_step: int) -> RolloutBatch:
        """This rank's prompts answered, and those of all ranks. Every rank must call it.

        `ppo_step` is part of the noise's key.
        """
        with self._rollout.phase():
            answered = [self._rollout.generate(batch, ppo_step=ppo_step) for batch in prompts]
        return gather_rollouts(answered, self._pad_token_id)

    @property
    def unfinished(self) -> Experience | None:
        """The experience that is still to be learned from, None between PPO steps."""
        return self._experience if self._at.minibatches_done < self._args.updates_per_ppo_step else None

    @property
    def kl_coef(self) -> float:
        """beta of the present PPO step, or between two of the last one; --kl_coef before the first."""
        return self._experience.kl_coef if self._experience else self._kl.coef

    @property
    def num_ppo_steps_done(self) -> int:
        """PPO steps that have been learned from to their end."""
        return self._at.ppo_step - (self.unfinished is not None)

    @property
    def num_updates_passed(self) -> int:
        """Optimiser steps of the run so far, skipped ones included."""
        return self.num_ppo_steps_done * self._args.updates_per_ppo_step + (
            self._at.minibatches_done if self.unfinished is not None else 0
        )

    def minibatches(self) -> Iterator[Minibatch]:
        """This rank's optimiser steps that are left of the present PPO step, over all its passes."""
        steps = (
            minibatch
            for epoch in range(self._args.ppo.ppo_epochs)
            for minibatch in self._experience.minibatches(epoch)
        )
        return islice(steps, self._at.minibatches_done, None)

    def _answer_and_judge(self, batches: list[PromptBatch]) -> tuple[RolloutBatch, AnswerAnalysis]:
        with self._timed("generation"):
            rollout = self.answer(batches, ppo_step=self._at.ppo_step)
        with self._timed("experience"):
            return rollout, self._judges.judge(rollout, self._rows_of_first_pass(rollout))

    def _checked(
        self, rollout: RolloutBatch, judgement: AnswerAnalysis, batches: list[PromptBatch]
    ) -> tuple[RolloutBatch, AnswerAnalysis]:
        """Answers that passed the rollout check, which is made once, before this process learns anything."""
        check, self._rollout_check = self._rollout_check, None
        if check is None:
            return rollout, judgement
        if self._rollout.uses_cache:
            if not check.wants_uncached(rollout, judgement.logprobs):
                return rollout, judgement
            self._rollout.uses_cache = False
            rollout, judgement = self._answer_and_judge(batches)
        check.require_agreement(rollout, judgement.logprobs)
        return rollout, judgement

    def _shaping_of(self, scores: Tensor) -> ScoreShaping:
        """How the raw scores of a rollout batch are shaped; running statistics count them in first."""
        if self._scores is None or not scores.isfinite().all():  # where no score is, nothing is learned
            return self.shaping
        self._scores.update(scores)
        return replace(self.shaping, mean=self._scores.mean, std=self._scores.std)

    def _rows_of_first_pass(self, rollout: RolloutBatch) -> list[Tensor]:
        """This rank's row numbers, in the micro-batches in which pass 0 will meet them."""
        lengths = rollout.attention_mask.sum(dim=1).cpu()
        steps = self.schedule.optimizer_steps(lengths, ppo_step=self._at.ppo_step, epoch=0)
        return [part for step_rows in steps for part in self.schedule.micro_batches(step_rows)]

    def train_rlhf(self, minibatch: Minibatch) -> None:
        """One optimiser step of actor and critic. Every rank must call it, with its part of the same step.

        Nothing is done after a step of this update has moved the actor beyond --target_approx_kl. During
        --critic_warmup_steps the actor waits: its weights, schedule and moving average stay as they are.
        """
        self._at.minibatches_done += 1
        if self._at.has_moved_enough:
            return
        with self._timed("training"):
            for engine in self.engine.trained:
                engine.train()
            blocks = self._next_texts() if self._texts and self._actor_learns else repeat(None)
            for micro_batch, text in zip(minibatch.micro_batches, blocks, strict=False):
                self._statistics.add(num_tokens=micro_batch.rollout.answer_mask.sum())
                if self._actor_learns:
                    self._train_actor(micro_batch, minibatch, text)
                if self.engine.critic:
                    self._train_critic(micro_batch, minibatch)
                if self._args.aligns_overflow:
                    take_steps_together(self.engine.trained if self._actor_learns else [self.engine.critic])
            self._at.updates_done += 1
            self._note_skipped()
            if self._actor_learns:
                if self.engine.ema and skipped_because(self.engine.actor) is None:
                    self.engine.ema.update()
                self._at.has_moved_enough = self._moves_too_far(minibatch)

    def _next_texts(self) -> list[TokenBatch]:
        self._at.num_text_steps += 1
        return next(self._text_steps).micro_batches

    @property
    def _actor_learns(self) -> bool:
        """Whether the present PPO step is past --critic_warmup_steps."""
        return self._experience.ppo_step >= self._args.ppo.critic_warmup_steps

    def _note_skipped(self) -> None:
        learning = {"actor": self.engine.actor if self._actor_learns else None, "critic": self.engine.critic}
        for name, engine in learning.items():
            if engine is not None:
                self._at.num_skipped += self._skipped.note(engine, step=self._at.ppo_step, model=name)

    def _tell_of_nonfinite_scores(self, judgement: AnswerAnalysis) -> None:
        if self._at.nonfinite_scores and not self._told_of_nonfinite_scores:
            self._told_of_nonfinite_scores = True
            messages.warning(
                f"PPO step {self._at.ppo_step + 1}: {self._at.nonfinite_scores} of "
                f"{len(judgement.scores)} scores are not finite. Such an answer counts with the mean of the "
                "others, and where there is no other the updates are skipped. metrics.jsonl goes on counting "
                "them as nonfinite_scores; a reward model that overflows needs --dtype bf16 or fp32."
            )

    def _moves_too_far(self, minibatch: Minibatch) -> bool:
        """Whether the approx_kl of the optimiser step just taken, over all ranks, is above the target.

        Every rank gets the same answer, as it is made of the same sum.
        """
        target, shares = self._args.ppo.target_approx_kl, self._moved
        self._moved = []
        return (
            target is not None
            and sum_across_ranks(sum(shares), axis="data").item() / minibatch.num_tokens > target
        )

    def _train_on(self, engine: DeepSpeedEngine, loss: Tensor) -> None:
        """Backward and step, or the backward alone where the steps are taken together."""
        (backward_on if self._args.aligns_overflow else train_on)(engine, loss)

    @phase(PhaseKind.TRAINING, "actor")
    def _train_actor(self, batch: MicroBatch, minibatch: Minibatch, text: TokenBatch | None) -> None:
        logprobs, entropy = predictions_of(
            self.engine.actor,
            batch.rollout.tokens,
            num_tokens=self._num_tokens,
            temperature=self._args.rollout.temperature,
            with_entropy=self._args.ppo.entropy_coef > 0,
        )
        loss = actor_loss(
            logprobs,
            entropy,
            batch,
            self._args.ppo,
            kl_coef=minibatch.kl_coef,
            num_tokens=minibatch.num_tokens,
        )
        total = loss.total
        if text is not None:
            # One backward pass for both: DeepSpeed reduces the gradients of each.
            unsup_loss = self._text_loss(text.to(total.device))
            total = total + self._args.text.unsup_coef * unsup_loss
            self._statistics.add(unsup_loss=unsup_loss)
        self._train_on(self.engine.actor, total)
        self._record_ratio(loss.logprobs, batch, is_first=minibatch.is_first)
        self._statistics.add(**loss.terms)

    def _text_loss(self, text: TokenBatch) -> Tensor:
        """This micro-batch's share of the text's mean loss per token. -> scalar."""
        logprobs = token_logprobs_of(
            self.engine.actor, text, num_tokens=self._num_tokens, every_position=True
        )
        return text_loss(logprobs, denominator=self._texts.num_targets)

    @torch.no_grad()
    def _record_ratio(self, logprobs: Tensor, batch: MicroBatch, *, is_first: bool) -> None:
        mask, (low, high) = batch.rollout.answer_mask, self._args.ppo.ratio_clips
        ratio = policy_ratio(logprobs, batch.logprobs, mask)
        moved = torch.where(mask, 0.5 * (logprobs - batch.logprobs) ** 2, 0).sum()
        self._moved.append(moved)
        self._statistics.add(
            approx_kl=moved,
            approx_k3=torch.where(mask, ratio - 1 - ratio.log(), 0).sum(),
            clip_fraction=(((ratio - 1 > high) | (1 - ratio > low)) & mask).sum(),
            ratio_mean=torch.where(mask, ratio, 0).sum(),
        )
        self._statistics.maximise(ratio_max=ratio.max())
        if is_first:
            self._statistics.maximise(first_minibatch_ratio_error=(ratio - 1).abs().max())

    @phase(PhaseKind.TRAINING, "critic")
    def _train_critic(self, batch: MicroBatch, minibatch: Minibatch) -> None:
        mask, clip = batch.rollout.answer_mask, self._args.ppo.value_clip
        values = values_of(self.engine.critic, batch.rollout.tokens)
        loss = clipped_value_loss(
            values, batch.values, batch.returns, mask, value_clip=clip, denominator=minibatch.num_tokens
        )
        self._train_on(self.engine.critic, loss)
        moved = ((values.detach() - batch.values).abs() > clip) & mask
        self._statistics.add(value_loss=loss, value_clip_fraction=moved.sum())

    @property
    def parts(self) -> dict[str, Stateful]:
        """What a checkpoint keeps of training beside the engines, in the order in which it is restored."""
        average = {"average": self.engine.ema} if self.engine.ema else {}
        return {
            **average,
            "statistics": self._statistics,
            "rollout": self._kept_rollout,
            "judgement": self._kept_judgement,
            "trainer": self,
        }

    @property
    def parts_to_keep(self) -> dict[str, Stateful]:
        """Those of `parts` that have something to keep now: without the experience between PPO steps."""
        if self.unfinished is None:
            return {name: part for name, part in self.parts.items() if name in ("average", "trainer")}
        self._kept_rollout.record = self._experience.rollout
        self._kept_judgement.record = self._experience.judgement
        return self.parts

    def state_dict(self) -> dict[str, Any]:
        """Where training stands, for JSON."""
        engines = self.engine.by_name
        return {
            "position": asdict(self._at),
            "kl_coef": self._kl.coef,
            "rollout_uses_cache": self._rollout.uses_cache,
            "scores": asdict(self._scores) if self._scores else None,
            "gradient_norms": {name: gradient_norm(engine) for name, engine in engines.items()},
            "seconds": self._seconds,
            "skipped": self._skipped.state_dict(),
            "experience": self._experience.settings if self.unfinished else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, with the rollout and judgement that are restored already."""
        self._at = Position(**state_dict["position"])
        self._kl.coef = state_dict["kl_coef"]
        self._rollout.uses_cache = state_dict["rollout_uses_cache"]
        if self._scores:
            self._scores = RunningStatistics(**state_dict["scores"])
        if self._texts:
            self._text_steps = self._texts.steps_after(self._at.num_text_steps)
        for name, engine in self.engine.by_name.items():
            set_gradient_norm(engine, state_dict["gradient_norms"][name])
        self._seconds = defaultdict(float, state_dict["seconds"])
        self._skipped.load_state_dict(state_dict["skipped"])
        settings = state_dict["experience"]
        if settings:
            self._experience = Experience.build(
                self._kept_rollout.record,
                self._kept_judgement.record,
                self._args.ppo,
                self.schedule,
                replace(self.shaping, mean=settings["mean"], std=settings["std"]),
                ppo_step=settings["ppo_step"],
                kl_coef=settings["kl_coef"],
            )

    def metrics(self) -> dict[str, float]:
        """The numbers of the last PPO step over all ranks, weighted by tokens. Every rank must call it."""
        assert self._experience is not None, "generate_experience comes first"
        sums, maxima = self._statistics.reduce()
        num_tokens, updates = sums.pop("num_tokens"), self._at.updates_done
        losses = {name: sums.pop(name) / updates for name in list(sums) if name.endswith("_loss")}
        return {
            **self._experience.metrics(),
            **losses,
            **{name: total / num_tokens for name, total in sums.items()},
            **maxima,
            "updates_done": updates,
            "skipped_steps": self._at.num_skipped,
            "nonfinite_scores": self._at.nonfinite_scores,
            **self._optimisers(),
            **self._speed(),
        }

    def _optimisers(self) -> dict[str, float]:
        engines = {"actor": self.engine.actor, "critic": self.engine.critic}
        values = {}
        for name, engine in engines.items():
            if engine is not None:
                values[f"{name}_grad_norm"] = gradient_norm(engine)
                values[f"{name}_lr"] = learning_rate(engine)
        return values

    def _speed(self) -> dict[str, float]:
        seconds = {f"seconds_{phase}": spent for phase, spent in self._seconds.items()}
        num_tokens = self._experience.rollout.attention_mask.sum().item()
        return {
            **seconds,
            "tokens_per_second": num_tokens / sum(seconds.values()),
            "peak_memory_gib": peak_memory_gib(),
        }
