"""PPO on one page, `PPOTrainer.step`. The mathematics: dschat/losses.py, docs/ppo.md."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

from torch.distributed.checkpoint.stateful import Stateful

from dschat.arguments import PpoArguments, RlhfArguments
from dschat.checkpoints.tensor_record import TensorRecord
from dschat.data.collate import PromptBatch
from dschat.data.loaders import TextLoader
from dschat.data.packing import PADDED, RowLayout
from dschat.data.rows import Rows
from dschat.distributed.device import peak_memory_gib
from dschat.engines.skipped_steps import SkippedSteps
from dschat.engines.step import gradient_norm, set_gradient_norm
from dschat.rlhf.analysis import AnswerAnalyzer
from dschat.rlhf.experience import (
    AnalyzedRollout,
    AnswerAnalysis,
    Experience,
    Minibatch,
    MinibatchSampler,
    build_minibatch_sampler,
    estimate_advantages,
    shape_rewards,
)
from dschat.rlhf.first_pass import FirstPass
from dschat.rlhf.kl_controller import KlController
from dschat.rlhf.phase_times import PhaseTimes
from dschat.rlhf.position import Position
from dschat.rlhf.rewards.sources import Rewards
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.rlhf.rollout.agreement import RolloutCheck
from dschat.rlhf.rollout.backend import RolloutBackend, Sampling, require
from dschat.rlhf.rollout.batch import RolloutBatch
from dschat.rlhf.rollout.sampler import CheckedSampler, RolloutSampler
from dschat.rlhf.score_scale import NonFiniteScores, ScoreScale
from dschat.rlhf.tokenizers import RlhfTokenizers
from dschat.rlhf.updates import ActorCriticUpdates, UpdateSettings

Metrics = dict[str, float]


class PPOTrainer:
    """`step(prompts)` for each PPO step; `build_trainer` makes one from flags."""

    def __init__(
        self,
        ppo: PpoArguments,
        engine: DeepSpeedRLHFEngine,
        *,
        updates_per_ppo_step: int,
        sampler: CheckedSampler,
        backend: RolloutBackend,
        minibatch_sampler: MinibatchSampler,
        score_scale: ScoreScale,
        updates: ActorCriticUpdates,
        times: PhaseTimes,
    ) -> None:
        self.engine, self.updates_per_ppo_step = engine, updates_per_ppo_step
        self.position = Position()
        self.experience: Experience | None = None
        """What the present or the last PPO step learns from."""
        self._ppo, self._sampler, self._backend = ppo, sampler, backend
        self._minibatch_sampler, self._score_scale = minibatch_sampler, score_scale
        self.updates, self._times = updates, times
        self._kl = KlController(ppo.kl_coef, ppo.kl_target, ppo.kl_horizon)
        self._nonfinite_scores = NonFiniteScores()
        self._resumed: AnalyzedRollout | None = None  # that of a PPO step which a checkpoint goes on inside
        self._kept_rollout, self._kept_analysis = TensorRecord(RolloutBatch), TensorRecord(AnswerAnalysis)

    def step(
        self,
        prompts: Sequence[PromptBatch],
        *,
        ppo_step: int,
        after_update: Callable[[], None] = lambda: None,
    ) -> Metrics:
        """Learn from answers to this rank's prompts; the numbers are those of the items of docs/ppo.md.

        The prompts of all ranks are one rollout batch. `ppo_step` is its number, from 0; `after_update` is
        called after each optimiser step. Where the run goes on inside the PPO step, what is done of it is
        not done again. Returns the metrics of item 11, over all ranks. Every rank must call it.
        """
        analyzed = self._resumed or self._sample_and_analyze(prompts, ppo_step)
        rollout, analysis, kl_coef = analyzed.rollout, analyzed.analysis, analyzed.kl_coef
        scores = analyzed.shaping(analysis.scores, rollout.ended)  # item 3
        rewards = shape_rewards(scores, analysis, rollout.answer_mask, self._ppo, kl_coef=kl_coef)  # item 4
        advantages, returns = estimate_advantages(rewards, analysis.values, rollout, self._ppo)  # item 6
        sampler = self._minibatch_sampler
        experience = Experience.of(analyzed, advantages, returns, self._ppo, sampler)  # item 7
        self.experience, self._resumed = experience, None
        for minibatch in self._minibatches_left(experience):  # item 10
            self.update(minibatch)  # items 8 and 9
            after_update()
        if self._trains_actor(ppo_step):  # while the actor waits, its KL says nothing of the coefficient
            self._kl.update(experience.kl.item(), len(scores))
        return self._metrics(experience)  # item 11

    def _sample_and_analyze(self, prompts: Sequence[PromptBatch], ppo_step: int) -> AnalyzedRollout:
        """Items 1, 2 and 5, and the raw scores of item 3."""
        self._times.reset()
        self.updates.begin_ppo_step()
        rollout, analysis = self._sampler.sample_and_analyze(prompts, ppo_step=ppo_step)
        analysis, num_bad = self._nonfinite_scores.replaced(analysis, ppo_step=ppo_step + 1)
        self.position.begin_ppo_step(ppo_step)
        self.position.nonfinite_scores = num_bad
        shaping = self._score_scale.shaping_of(analysis.scores)
        return AnalyzedRollout(rollout, analysis, shaping, kl_coef=self._kl.coef, ppo_step=ppo_step)

    def _minibatches_left(self, experience: Experience) -> Iterator[Minibatch]:
        """This rank's optimiser steps that are left of the PPO step, over all its passes."""
        epochs = range(self._ppo.ppo_epochs)
        steps = (minibatch for epoch in epochs for minibatch in experience.minibatches(epoch))
        return islice(steps, self.position.minibatches_done, None)

    def update(self, minibatch: Minibatch) -> None:
        """One optimiser step of actor and critic, on this rank's part of it. Every rank must call it.

        Nothing is done once a step of this PPO step has moved the actor beyond --target_approx_kl.
        """
        self.position.minibatches_done += 1
        if self.position.has_moved_enough:
            return
        with self._times.measured("training"):
            assert self.experience is not None, "a minibatch is a part of the experience"
            trains_actor = self._trains_actor(self.experience.ppo_step)
            self.updates.step(minibatch, self.position, trains_actor=trains_actor)

    def _trains_actor(self, ppo_step: int) -> bool:
        """Whether the PPO step is past --critic_warmup_steps."""
        return ppo_step >= self._ppo.critic_warmup_steps

    def _metrics(self, experience: Experience) -> Metrics:
        return {
            **experience.metrics(),
            **self.updates.metrics(self.position),
            **self._times.metrics(),
            "peak_memory_gib": peak_memory_gib(),
        }

    @property
    def is_inside_ppo_step(self) -> bool:
        """Whether a rollout batch is still to be learned from."""
        return self.position.is_inside(self.updates_per_ppo_step)

    @property
    def num_ppo_steps_done(self) -> int:
        """PPO steps of the run that are learned from to their end."""
        return self.position.num_ppo_steps_done(self.updates_per_ppo_step)

    @property
    def num_updates(self) -> int:
        """Optimiser steps of the run so far, skipped ones included."""
        return self.position.num_updates(self.updates_per_ppo_step)

    @property
    def parts(self) -> dict[str, Stateful]:
        """The parts that a checkpoint restores, beside the engines, in this order."""
        average: dict[str, Stateful] = {"average": self.engine.ema} if self.engine.ema else {}
        return {
            **average,
            "statistics": self.updates.statistics,
            "rollout": self._kept_rollout,
            "judgement": self._kept_analysis,
            "trainer": self,
        }

    @property
    def parts_to_keep(self) -> dict[str, Stateful]:
        """Those of `parts` that a checkpoint made now keeps: without the experience between PPO steps."""
        if not self.is_inside_ppo_step:
            return {name: part for name, part in self.parts.items() if name in ("average", "trainer")}
        assert self.experience is not None, "there is experience inside a PPO step"
        self._kept_rollout.record = self.experience.rollout
        self._kept_analysis.record = self.experience.analysis
        return self.parts

    def state_dict(self) -> dict[str, Any]:
        """Where training stands, for JSON."""
        engines = self.engine.by_name
        return {
            "position": asdict(self.position),
            "kl_coef": self._kl.coef,
            "rollout_uses_cache": self._backend.uses_cache,
            "scores": self._score_scale.state(),
            "gradient_norms": {name: gradient_norm(engine) for name, engine in engines.items()},
            "seconds": self._times.seconds,
            "skipped": self.updates.skipped.state_dict(),
            "experience": self.experience.settings if self.experience and self.is_inside_ppo_step else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, with the rollout and the analysis that are analyzed already."""
        self.position = Position(**state_dict["position"])
        self._kl.coef = state_dict["kl_coef"]
        self._backend.uses_cache = state_dict["rollout_uses_cache"]
        self._score_scale.load_state(state_dict["scores"])
        self.updates.resume(self.position)
        for name, engine in self.engine.by_name.items():
            set_gradient_norm(engine, state_dict["gradient_norms"][name])
        self._times.seconds.update(state_dict["seconds"])
        self.updates.skipped.load_state_dict(state_dict["skipped"])
        settings = state_dict["experience"]
        if settings:
            self._kl.coef = settings["kl_coef"]  # steered at the end of the PPO step
            rollout, analysis = self._kept_rollout.record, self._kept_analysis.record
            assert rollout is not None, "the rollout is restored before the trainer"
            assert analysis is not None, "the analysis is restored before the trainer"
            self._resumed = AnalyzedRollout(
                rollout,
                analysis,
                replace(self._score_scale.fixed, mean=settings["mean"], std=settings["std"]),
                kl_coef=settings["kl_coef"],
                ppo_step=settings["ppo_step"],
            )


def build_trainer(
    args: RlhfArguments,
    engine: DeepSpeedRLHFEngine,
    tokenizers: RlhfTokenizers,
    backend: RolloutBackend,
    *,
    prompts: Rows | None = None,
    score_scale: tuple[float, float] = (0.0, 1.0),
    rewards: Rewards | None = None,
    texts: TextLoader | None = None,
    layout: RowLayout = PADDED,
) -> PPOTrainer:
    """The trainer that the flags describe.

    `score_scale` is the mean and standard deviation that scores are brought to 0 and 1 by. The data set of
    `prompts` is needed where the reward model has a tokenizer of its own, and where there are `rewards`,
    other sources of scores. `texts` are learned beside the answers. Raises `UserError` where the back end
    lacks an ability that the flags ask for.
    """
    tokenizer, times = tokenizers.actor, PhaseTimes()
    analyzer = AnswerAnalyzer(engine, tokenizers, args, prompts, rewards, layout=layout)
    minibatch_sampler = build_minibatch_sampler(args.ppo, args.optimizer, args.run, layout)
    on_mismatch = args.rollout.rollout_on_mismatch
    check = RolloutCheck.of(args.rollout_tolerance, on_mismatch, engine=backend.name)
    sampling = Sampling.of(args.rollout, seed=args.run.seed, with_logprobs=args.records_rollout_logprobs)
    require(backend, sampling, on_mismatch=on_mismatch if check else "stop")

    kept = args.rlhf.reuse_first_pass
    first_pass = None if kept == "none" else FirstPass(keeps_critic=kept == "both")

    def analyze(rollout: RolloutBatch, ppo_step: int) -> AnswerAnalysis:
        if first_pass is not None:
            first_pass.begin(keeps_actor=ppo_step >= args.ppo.critic_warmup_steps)
        rows = minibatch_sampler.rows_of_first_pass(rollout, ppo_step)
        return analyzer.analyze(rollout, rows, first_pass=first_pass)

    return PPOTrainer(
        args.ppo,
        engine,
        updates_per_ppo_step=args.updates_per_ppo_step,
        sampler=CheckedSampler(
            RolloutSampler(backend, sampling, tokenizer.pad_token_id), analyze, check, times
        ),
        backend=backend,
        minibatch_sampler=minibatch_sampler,
        score_scale=ScoreScale(args.ppo, score_scale, has_sources=rewards is not None),
        updates=ActorCriticUpdates(
            engine,
            UpdateSettings(
                args.ppo,
                temperature=args.rollout.temperature,
                num_tokens=len(tokenizer),
                unsup_coef=args.text.unsup_coef,
                aligns_overflow=args.aligns_overflow,
            ),
            SkippedSteps(args.run),
            texts,
            first_pass,
        ),
        times=times,
    )
