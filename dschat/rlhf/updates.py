"""One optimiser step of actor and critic on a minibatch, items 8 and 9 of docs/ppo.md, and what it did."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from itertools import repeat

import torch
from torch import Tensor

from dschat.arguments import PpoArguments
from dschat.data.loaders import TextLoader
from dschat.data.token_batch import TokenBatch
from dschat.distributed.collectives import sum_across_ranks
from dschat.engines.memory_remedies import PhaseKind
from dschat.engines.out_of_memory import phase
from dschat.engines.skipped_steps import SkippedSteps
from dschat.engines.step import (
    backward_on,
    gradient_norm,
    learning_rate,
    skipped_because,
    take_steps_together,
    train_on,
)
from dschat.losses import clipped_value_loss, policy_ratio, text_loss
from dschat.models.forward import predictions_of, token_logprobs_of, values_of
from dschat.rlhf.actor_loss import actor_loss
from dschat.rlhf.experience import MicroBatch, Minibatch
from dschat.rlhf.first_pass import FirstPass
from dschat.rlhf.position import Position
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.rlhf.update_statistics import UpdateStatistics


@dataclass(frozen=True)
class UpdateSettings:
    """The numbers that an optimiser step depends on."""

    ppo: PpoArguments
    temperature: float
    num_tokens: int
    """Tokens of the tokenizer, over which probabilities are computed."""
    unsup_coef: float = 0.0
    """Coefficient of the loss of texts."""
    aligns_overflow: bool = False
    """Whether actor and critic skip a step together where the gradient of one overflows."""


class ActorCriticUpdates:
    """The optimiser steps of a run. `texts` are learned by the actor beside the answers.

    What `first_pass` keeps of the analysis is learned from in place of a further pass over the same rows.
    """

    def __init__(
        self,
        engine: DeepSpeedRLHFEngine,
        settings: UpdateSettings,
        skipped: SkippedSteps,
        texts: TextLoader | None = None,
        first_pass: FirstPass | None = None,
    ) -> None:
        self.skipped = skipped
        self.statistics = UpdateStatistics()
        """What the optimiser steps of the present PPO step did."""
        self.watch: Callable[[str, MicroBatch, Tensor], None] = lambda role, batch, output: None
        """Called with what "actor" and "critic" say of the rows that they learn from: log-probabilities or
        values [B, T] before the optimiser step, without gradient."""
        self._engine, self._settings = engine, settings
        self._texts, self._text_steps = texts, iter(texts or ())
        self._first_pass = first_pass or FirstPass()
        self._train_on = backward_on if settings.aligns_overflow else train_on

    def begin_ppo_step(self) -> None:
        """Begin the statistics anew."""
        self.statistics = UpdateStatistics()

    def resume(self, position: Position) -> None:
        """Go on with the texts where the run stands, and without the graph of an analysis."""
        self._first_pass.begin(keeps_actor=False)
        if self._texts:
            self._text_steps = self._texts.steps_after(position.num_text_steps)

    def step(self, minibatch: Minibatch, position: Position, *, trains_actor: bool) -> None:
        """Train on a minibatch, and note in the position what became of it. Every rank must call it.

        Without `trains_actor` its weights, schedule and moving average stay as they are.
        """
        engine, moved = self._engine, []
        for model in engine.trained:
            model.train()
        blocks = self._next_texts(position) if self._texts and trains_actor else repeat(None)
        for micro_batch, text in zip(minibatch.micro_batches, blocks, strict=False):
            self.statistics.add(num_tokens=micro_batch.rollout.answer_mask.sum())
            if trains_actor:
                moved.append(self._train_actor(micro_batch, minibatch, text))
            if engine.critic:
                self._train_critic(micro_batch, minibatch)
            if self._settings.aligns_overflow:
                take_steps_together(engine.trained if trains_actor else [engine.critic])
        position.updates_done += 1
        self._note_skipped(position, trains_actor=trains_actor)
        if trains_actor:
            if engine.ema and skipped_because(engine.actor) is None:
                engine.ema.update()
            position.has_moved_enough = self._moves_too_far(moved, minibatch)

    def _next_texts(self, position: Position) -> list[TokenBatch]:
        position.num_text_steps += 1
        return next(self._text_steps).micro_batches

    def _note_skipped(self, position: Position, *, trains_actor: bool) -> None:
        learning = {"actor": self._engine.actor if trains_actor else None, "critic": self._engine.critic}
        for name, engine in learning.items():
            if engine is not None:
                position.num_skipped += self.skipped.note(engine, step=position.ppo_step, model=name)

    def _moves_too_far(self, moved: list[Tensor], minibatch: Minibatch) -> bool:
        """Whether the approx_kl of the optimiser step just taken, over all ranks, is above the target.

        `moved` are its sums over the tokens of micro-batches. Ranks decide alike, as they have the same sum.
        """
        target = self._settings.ppo.target_approx_kl
        return (
            target is not None
            and sum_across_ranks(reduce(torch.add, moved), axis="data").item() / minibatch.num_tokens > target
        )

    @phase(PhaseKind.TRAINING, "actor")
    def _train_actor(self, batch: MicroBatch, minibatch: Minibatch, text: TokenBatch | None) -> Tensor:
        """-> the micro-batch's sum of approx_kl over tokens, measured before the step."""
        logprobs, entropy = self._first_pass.take_actor() or predictions_of(
            self._engine.actor,
            batch.tokens,
            num_tokens=self._settings.num_tokens,
            temperature=self._settings.temperature,
            with_entropy=self._settings.ppo.entropy_coef > 0,
        )
        loss = actor_loss(
            logprobs,
            entropy,
            batch,
            self._settings.ppo,
            kl_coef=minibatch.kl_coef,
            num_tokens=minibatch.num_tokens,
        )
        total = loss.total
        if text is not None:
            # One backward pass for both: DeepSpeed reduces the gradients of each.
            unsup_loss = self._text_loss(text.to(total.device))
            total = total + self._settings.unsup_coef * unsup_loss
            self.statistics.add(unsup_loss=unsup_loss)
        self._train_on(self._engine.actor, total)
        self.watch("actor", batch, loss.logprobs)
        moved = self._record_ratio(loss.logprobs, batch, is_first=minibatch.is_first)
        self.statistics.add(**loss.terms)
        return moved

    def _text_loss(self, text: TokenBatch) -> Tensor:
        """This micro-batch's share of the text's mean loss per token. -> scalar."""
        assert self._texts is not None, "a text comes from the loader of texts"
        logprobs = token_logprobs_of(
            self._engine.actor, text, num_tokens=self._settings.num_tokens, every_position=True
        )
        return text_loss(logprobs, denominator=self._texts.num_targets)

    @torch.no_grad()
    def _record_ratio(self, logprobs: Tensor, batch: MicroBatch, *, is_first: bool) -> Tensor:
        mask, (low, high) = batch.rollout.answer_mask, self._settings.ppo.ratio_clips
        ratio = policy_ratio(logprobs, batch.logprobs, mask)
        moved = torch.where(mask, 0.5 * (logprobs - batch.logprobs) ** 2, 0).sum()
        self.statistics.add(
            approx_kl=moved,
            approx_k3=torch.where(mask, ratio - 1 - ratio.log(), 0).sum(),
            clip_fraction=(((ratio - 1 > high) | (1 - ratio > low)) & mask).sum(),
            ratio_mean=torch.where(mask, ratio, 0).sum(),
        )
        self.statistics.maximise(ratio_max=ratio.max())
        if is_first:
            self.statistics.maximise(first_minibatch_ratio_error=(ratio - 1).abs().max())
        return moved

    @phase(PhaseKind.TRAINING, "critic")
    def _train_critic(self, batch: MicroBatch, minibatch: Minibatch) -> None:
        mask, clip = batch.rollout.answer_mask, self._settings.ppo.value_clip
        assert batch.values is not None, "a critic that is trained has valued the answers"
        values = self._first_pass.take_critic()
        if values is None:
            values = values_of(self._engine.critic, batch.tokens)
        loss = clipped_value_loss(
            values, batch.values, batch.returns, mask, value_clip=clip, denominator=minibatch.num_tokens
        )
        self.watch("critic", batch, values.detach())
        self._train_on(self._engine.critic, loss)
        moved = ((values.detach() - batch.values).abs() > clip) & mask
        self.statistics.add(value_loss=loss, value_clip_fraction=moved.sum())

    def metrics(self, position: Position) -> dict[str, float]:
        """What the optimiser steps of the PPO step did, over all ranks. Every rank must call it."""
        sums, maxima = self.statistics.reduce()
        num_tokens, updates = sums.pop("num_tokens"), position.updates_done
        losses = {name: sums.pop(name) / updates for name in list(sums) if name.endswith("_loss")}
        return {
            **losses,
            **{name: total / num_tokens for name, total in sums.items()},
            **maxima,
            "updates_done": updates,
            "skipped_steps": position.num_skipped,
            "nonfinite_scores": position.nonfinite_scores,
            **self._optimisers(),
        }

    def _optimisers(self) -> dict[str, float]:
        values = {}
        for name, engine in self._engine.by_name.items():
            values[f"{name}_grad_norm"] = gradient_norm(engine)
            values[f"{name}_lr"] = learning_rate(engine)
        return values
