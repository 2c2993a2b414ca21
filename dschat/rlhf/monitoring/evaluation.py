"""What the policy does with prompts that it never learns from."""

import time
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from dschat.arguments import RlhfArguments
from dschat.console import messages
from dschat.data.loaders import build_eval_prompts
from dschat.distributed.collectives import gather_rows
from dschat.distributed.device import current_device, synchronize
from dschat.distributed.mesh import mesh
from dschat.distributed.statistics import standard_error
from dschat.losses import kl_estimate, masked_mean
from dschat.models.forward import scores_of
from dschat.rlhf.analysis import AnswerAnalyzer
from dschat.rlhf.experience import AnswerAnalysis, finite_scores
from dschat.rlhf.monitoring.gains import Answers
from dschat.rlhf.ppo_trainer import DeepSpeedPPOTrainer
from dschat.rlhf.rollout.batch import RolloutBatch
from dschat.rlhf.tokenizers import RlhfTokenizers, build_retokenizer

EVALUATION = -1
"""The PPO step in the key of an evaluation's noise: no real one, and the same each time. So two evaluations
differ by what the policy has learned, not by luck."""


MOST_SAMPLES = 8
"""Answers to a prompt that are not asked for: what more of them tell is about the same prompts."""


class Evaluator:
    """Answers a fixed sample of held-out prompts as PPO would, and judges the answers."""

    def __init__(
        self,
        trainer: DeepSpeedPPOTrainer,
        tokenizers: RlhfTokenizers,
        args: RlhfArguments,
        prompts: Dataset,
    ) -> None:
        num_prompts = args.guard.num_eval_prompts or args.rollout_size * mesh().data.size
        self.answers: Answers | None = None
        """What the last evaluation found of each answer."""
        self._batches = build_eval_prompts(
            prompts,
            num_prompts=num_prompts,
            samples_per_prompt=samples_per_prompt(args, len(prompts), num_prompts),
            pad_id=tokenizers.actor.pad_token_id,
            batch_size=args.rollout.per_device_generation_batch_size,
            rank=mesh().data.rank,
            world_size=mesh().data.size,
        )
        self._trainer, self._engine = trainer, trainer.engine
        self._judges = AnswerAnalyzer(
            trainer.engine, tokenizers, args, prompts, trainer.rewards, in_evaluation=True
        )
        self._first_kl_coef = args.ppo.kl_coef
        self._shaping = trainer.shaping
        self._needs_scale = args.ppo.score_scale == "running"
        self._guard_reading = build_retokenizer(trainer.engine.specs, "guard", tokenizers, prompts)

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """The figures with eval_ of docs/ppo.md, over all ranks. Every rank must call it."""
        start = time.perf_counter()
        device = current_device()
        rollout = self._trainer.answer([batch.to(device) for batch in self._batches], ppo_step=EVALUATION)
        real = rollout.prompt_rows >= 0
        # A filler passes through the models as the first prompt, and is left out of every figure.
        rollout = replace(rollout, prompt_rows=rollout.prompt_rows.clamp(min=0))
        by_length = rollout.attention_mask.sum(dim=1).cpu().argsort(stable=True)
        rows = self._trainer.schedule.micro_batches(by_length)
        judged = self._judges.judge(rollout, rows, with_values=False)
        values = self._of_answers(rollout, judged, real)
        if self._engine.guard_reward is not None:
            guard_scores, _ = finite_scores(self._guard_scores(rollout, rows)[real])
            values["guard_score"] = guard_scores.mean()
            values["guard_score_stderr"] = standard_error(guard_scores, rollout.prompt_rows[real])
        synchronize()
        figures = {f"eval_{name}": value.item() for name, value in values.items()}
        return figures | {"seconds_evaluation": time.perf_counter() - start}

    def _of_answers(self, rollout: RolloutBatch, judged: AnswerAnalysis, real: Tensor) -> dict[str, Tensor]:
        mask, ended = rollout.answer_mask[real], rollout.ended[real]
        scores, num_bad = finite_scores(judged.scores[real])
        log_ratio = judged.log_ratio(rollout.answer_mask)[real]
        kl = log_ratio.sum(dim=1)
        if self._needs_scale and scores.isfinite().all():  # of the first evaluation, so that all compare
            std = scores.std(correction=0).item()
            self._shaping = replace(self._shaping, mean=scores.mean().item(), std=std if std > 0 else 1.0)
            self._needs_scale = False
        objectives = self._shaping(scores, ended) - self._first_kl_coef * kl
        self.answers = Answers.of(rollout.prompt_rows[real], scores, objectives)
        return {
            "score": scores.mean(),
            "score_stderr": standard_error(scores, rollout.prompt_rows[real]),
            "kl": kl.mean(),
            "k3": kl_estimate(log_ratio, torch.zeros_like(log_ratio), "k3").sum(dim=1).mean(),
            "score_minus_kl": scores.mean() - self._trainer.kl_coef * kl.mean(),
            "objective": objectives.mean(),
            "entropy": masked_mean(judged.entropy[real], mask),
            "answer_length": mask.sum(dim=1).float().mean(),
            "eos_share": ended.float().mean(),
            "nonfinite_scores": torch.tensor(num_bad),
            **{f"score_{name}": scores[real].mean() for name, scores in judged.by_source.items()},
        }

    def _guard_scores(self, rollout: RolloutBatch, rows: list[Tensor]) -> Tensor:
        """The second reward model's scores of all ranks' answers. -> [B]."""
        reading, device = self._guard_reading, rollout.input_ids.device
        parts = []
        for part in rows:
            batch = rollout.rows(part.to(device))
            read = reading.read(batch) if reading else batch
            parts.append(scores_of(self._engine.guard_reward, read.tokens))
        order = gather_rows(torch.cat(rows).to(device), axis="data").argsort()
        return gather_rows(torch.cat(parts), axis="data")[order]

    def state_dict(self) -> dict[str, Any]:
        """What later evaluations need of earlier ones, for JSON."""
        return {"mean": self._shaping.mean, "std": self._shaping.std, "needs_scale": self._needs_scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._shaping = replace(self._shaping, mean=state["mean"], std=state["std"])
        self._needs_scale = state["needs_scale"]


def samples_per_prompt(args: RlhfArguments, num_held_out: int, num_prompts: int) -> int:
    """Answers to each prompt: where fewer prompts are held out than wanted, several make up for them."""
    if args.guard.eval_samples_per_prompt is not None:
        return args.guard.eval_samples_per_prompt
    samples = min(-(-num_prompts // num_held_out), MOST_SAMPLES)
    if samples > 1:
        messages.note(
            f"{num_held_out} prompts are held out where an evaluation takes {num_prompts}, so each is "
            f"answered {samples} times (--eval_samples_per_prompt); more prompts tell more: "
            "--eval_fraction, --eval_data_path."
        )
    return samples


def build_evaluator(
    trainer: DeepSpeedPPOTrainer,
    tokenizers: RlhfTokenizers,
    args: RlhfArguments,
    prompts: Dataset,
) -> Evaluator | None:
    """The evaluator, None where --eval_interval is 0 or there are no prompts held out, which is said."""
    if args.guard.eval_interval == 0:
        return None
    if len(prompts) == 0:
        messages.note(
            "no prompts are held out (--eval_fraction, --eval_data_path), so PPO is not evaluated and "
            "actor/ will be the actor of the last PPO step."
        )
        return None
    return Evaluator(trainer, tokenizers, args, prompts)
