"""What the policy does with prompts that it never learns from."""

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dschat.arguments import RlhfArguments
from dschat.console import messages
from dschat.data.collate import PromptBatch
from dschat.data.loaders import build_eval_prompts
from dschat.data.packing import PADDED, RowLayout
from dschat.data.rows import Rows
from dschat.distributed.collectives import gather_rows
from dschat.distributed.device import current_device, synchronize
from dschat.distributed.mesh import mesh
from dschat.distributed.statistics import standard_error
from dschat.engines.at_rest import in_use
from dschat.losses import kl_estimate, masked_mean
from dschat.models.forward import scores_of
from dschat.rlhf.analysis import AnswerAnalyzer
from dschat.rlhf.experience import (
    AnswerAnalysis,
    MinibatchSampler,
    ScoreShaping,
    build_minibatch_sampler,
    finite_scores,
)
from dschat.rlhf.monitoring.gains import Answers
from dschat.rlhf.phase_times import PhaseTimes
from dschat.rlhf.rewards.retokenize import Retokenizer
from dschat.rlhf.rewards.sources import Rewards
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.rlhf.rollout.agreement import RolloutCheck
from dschat.rlhf.rollout.backend import RolloutBackend, Sampling
from dschat.rlhf.rollout.batch import RolloutBatch
from dschat.rlhf.rollout.sampler import CheckedSampler, RolloutSampler
from dschat.rlhf.score_scale import ScoreScale
from dschat.rlhf.tokenizers import RlhfTokenizers, build_retokenizer

EVALUATION = -1
"""The PPO step in the key of an evaluation's noise: no real one, and the same each time. So two evaluations
differ by what the policy has learned, not by luck."""


MOST_SAMPLES = 8
"""Answers to a prompt that are not asked for: what more of them tell is about the same prompts."""


class Evaluator:
    """Answers a fixed sample of held-out prompts as PPO would, and analyses the answers."""

    def __init__(
        self,
        batches: list[PromptBatch],
        *,
        engine: DeepSpeedRLHFEngine,
        sampler: RolloutSampler,
        check: RolloutCheck | None,
        minibatch_sampler: MinibatchSampler,
        analyzer: AnswerAnalyzer,
        guard_retokenizer: Retokenizer | None,
        shaping: ScoreShaping,
        has_running_scale: bool,
        first_kl_coef: float,
    ) -> None:
        """`batches` are this rank's prompts; a prompt's row is -1 in a filler. `check` is of all answers.

        With `has_running_scale` scores have the scale of the first evaluation's.
        """
        self._answers: Answers | None = None
        self._batches, self._engine, self._check = batches, engine, check
        self._sampler = CheckedSampler(sampler, self._analyze, check, PhaseTimes(), every_time=True)
        self._minibatch_sampler, self._analyzer = minibatch_sampler, analyzer
        self._guard_retokenizer = guard_retokenizer
        self._shaping, self._needs_scale = shaping, has_running_scale
        self._first_kl_coef = first_kl_coef

    @property
    def answers(self) -> Answers:
        """What the last evaluation found of each answer; there must have been one."""
        assert self._answers is not None, "nothing is evaluated yet"
        return self._answers

    @torch.no_grad()
    def evaluate(self, *, kl_coef: float | None = None) -> dict[str, float]:
        """The metrics with eval_ of docs/ppo.md, over all ranks. Every rank must call it.

        `kl_coef` is the beta of the last PPO step, by default the first beta.
        """
        start = time.perf_counter()
        device = current_device()
        batches = [batch.to(device) for batch in self._batches]
        rollout, analysis = self._sampler.sample_and_analyze(batches, ppo_step=EVALUATION)
        real = rollout.prompt_rows >= 0
        rollout = _without_fillers(rollout)
        kl_coef = self._first_kl_coef if kl_coef is None else kl_coef
        values = self._of_answers(rollout, analysis, real, kl_coef=kl_coef)
        if self._engine.guard_reward is not None:
            guard_scores, _ = finite_scores(self._guard_scores(rollout, self._rows(rollout))[real])
            values["guard_score"] = guard_scores.mean()
            values["guard_score_stderr"] = standard_error(guard_scores, rollout.prompt_rows[real])
        synchronize()
        metrics = {f"eval_{name}": value.item() for name, value in values.items()}
        if self._check is not None and self._check.difference is not None:
            metrics["eval_rollout_difference"] = self._check.difference.mean
        return metrics | {"seconds_evaluation": time.perf_counter() - start}

    def _analyze(self, rollout: RolloutBatch, _: int) -> AnswerAnalysis:
        rollout = _without_fillers(rollout)
        return self._analyzer.analyze(rollout, self._rows(rollout), with_values=False)

    def _rows(self, rollout: RolloutBatch) -> list[Tensor]:
        """This rank's micro-batches, answers of similar length together."""
        by_length = rollout.attention_mask.sum(dim=1).cpu().argsort(stable=True)
        return self._minibatch_sampler.micro_batches(by_length)

    def _of_answers(
        self, rollout: RolloutBatch, analysis: AnswerAnalysis, real: Tensor, *, kl_coef: float
    ) -> dict[str, Tensor]:
        mask, ended = rollout.answer_mask[real], rollout.ended[real]
        scores, num_bad = finite_scores(analysis.scores[real])
        log_ratio = analysis.log_ratio(rollout.answer_mask)[real]
        kl = log_ratio.sum(dim=1)
        if self._needs_scale and scores.isfinite().all():  # of the first evaluation, so that all compare
            std = scores.std(correction=0).item()
            self._shaping = replace(self._shaping, mean=scores.mean().item(), std=std if std > 0 else 1.0)
            self._needs_scale = False
        objectives = self._shaping(scores, ended) - self._first_kl_coef * kl
        self._answers = Answers.of(rollout.prompt_rows[real], scores, objectives)
        return {
            "score": scores.mean(),
            "score_stderr": standard_error(scores, rollout.prompt_rows[real]),
            "kl": kl.mean(),
            "k3": kl_estimate(log_ratio, torch.zeros_like(log_ratio), "k3").sum(dim=1).mean(),
            "score_minus_kl": scores.mean() - kl_coef * kl.mean(),
            "objective": objectives.mean(),
            "entropy": masked_mean(analysis.entropy[real], mask),
            "answer_length": mask.sum(dim=1).float().mean(),
            "eos_share": ended.float().mean(),
            "nonfinite_scores": torch.tensor(num_bad),
            **{f"score_{name}": scores[real].mean() for name, scores in analysis.by_source.items()},
        }

    def _guard_scores(self, rollout: RolloutBatch, rows: list[Tensor]) -> Tensor:
        """The second reward model's scores of all ranks' answers. -> [B]."""
        retokenizer, device = self._guard_retokenizer, rollout.input_ids.device
        parts = []
        with in_use(self._engine.guard_reward) as guard:
            for part in rows:
                batch = rollout.rows(part.to(device))
                read = retokenizer.read(batch) if retokenizer else batch
                parts.append(scores_of(guard, read.tokens.placed(self._minibatch_sampler.layout)))
        order = gather_rows(torch.cat(rows).to(device), axis="data").argsort()
        return gather_rows(torch.cat(parts), axis="data")[order]

    def state_dict(self) -> dict[str, Any]:
        """What later evaluations need of earlier ones, for JSON."""
        return {"mean": self._shaping.mean, "std": self._shaping.std, "needs_scale": self._needs_scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._shaping = replace(self._shaping, mean=state["mean"], std=state["std"])
        self._needs_scale = state["needs_scale"]


def _without_fillers(rollout: RolloutBatch) -> RolloutBatch:
    """A filler passes through the models as the first prompt, and is left out of every metric."""
    return replace(rollout, prompt_rows=rollout.prompt_rows.clamp(min=0))


def samples_per_prompt(asked_for: int | None, num_held_out: int, num_prompts: int) -> int:
    """Answers to each prompt: where fewer prompts are held out than wanted, several make up for them."""
    if asked_for is not None:
        return asked_for
    samples = min(-(-num_prompts // num_held_out), MOST_SAMPLES)
    if samples > 1:
        messages.note(
            f"{num_held_out} prompts are held out where an evaluation takes {num_prompts}, so each is "
            f"answered {samples} times (--eval_samples_per_prompt); more prompts tell more: "
            "--eval_fraction, --eval_data_path."
        )
    return samples


def build_evaluator(
    args: RlhfArguments,
    engine: DeepSpeedRLHFEngine,
    tokenizers: RlhfTokenizers,
    backend: RolloutBackend,
    prompts: Rows,
    *,
    score_scale: tuple[float, float] = (0.0, 1.0),
    rewards: Rewards | None = None,
    layout: RowLayout = PADDED,
) -> Evaluator | None:
    """The evaluator, None where --eval_interval is 0 or no prompts are held out, of which a note tells."""
    if args.guard.eval_interval == 0:
        return None
    if len(prompts) == 0:
        messages.note(
            "no prompts are held out (--eval_fraction, --eval_data_path), so PPO is not evaluated and "
            "actor/ will be the actor of the last PPO step."
        )
        return None
    num_prompts = args.guard.num_eval_prompts or args.rollout_size * mesh().data.size
    pad_token_id = tokenizers.actor.pad_token_id
    on_mismatch = args.rollout.rollout_on_mismatch
    check = RolloutCheck.of(args.rollout_tolerance, on_mismatch, engine=backend.name, is_quiet=True)
    sampling = Sampling.of(args.rollout, seed=args.run.seed, with_logprobs=check is not None)
    return Evaluator(
        build_eval_prompts(
            prompts,
            num_prompts=num_prompts,
            samples_per_prompt=samples_per_prompt(
                args.guard.eval_samples_per_prompt, len(prompts), num_prompts
            ),
            pad_id=pad_token_id,
            batch_size=args.rollout.per_device_generation_batch_size,
            rank=mesh().data.rank,
            world_size=mesh().data.size,
            multiple_of=args.widths.multiple_of(engine.actor.device.type),
        ),
        engine=engine,
        sampler=RolloutSampler(backend, sampling, pad_token_id),
        check=check,
        minibatch_sampler=build_minibatch_sampler(args.ppo, args.optimizer, args.run, layout),
        analyzer=AnswerAnalyzer(
            engine, tokenizers, args, prompts, rewards, layout=layout, in_evaluation=True
        ),
        guard_retokenizer=build_retokenizer(engine.specs, "guard", tokenizers, prompts),
        shaping=ScoreScale(args.ppo, score_scale, has_sources=rewards is not None).fixed,
        has_running_scale=args.ppo.score_scale == "running",
        first_kl_coef=args.ppo.kl_coef,
    )
