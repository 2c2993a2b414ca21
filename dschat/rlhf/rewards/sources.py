"""Scores from other sources than the reward model alone, and their weighted sum (docs/rewards.md)."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dschat.arguments import REWARD_MODEL, RewardSourceArguments
from dschat.console import messages
from dschat.data.rows import Rows
from dschat.distributed.collectives import all_gather_object, gather_rows, sum_across_ranks
from dschat.distributed.mesh import mesh
from dschat.errors import UserError
from dschat.rlhf.rewards.endpoint import RewardEndpoint
from dschat.rlhf.rewards.function import RewardFunction
from dschat.rlhf.rewards.retokenize import answer_texts, prompt_texts
from dschat.rlhf.rewards.text_answers import Problem, Score, TextAnswers
from dschat.rlhf.rollout.batch import RolloutBatch

MAX_FAILURES = 3
"""Rollout batches in a row, or evaluations, without any score of a source, before the run ends."""
TAKEN = ("prompts", "answers")
"""Parameters of a function beside the columns; a column of that name is called row_prompts or row_answers."""


def column_name(name: str) -> str:
    """The name under which a column of the data reaches a source."""
    return f"row_{name}" if name in TAKEN else name


@dataclass(frozen=True)
class RewardParts:
    """Scores of all sources for a rollout batch of all ranks."""

    scores: Tensor
    """The weighted sum, fp32 [B]."""
    by_source: dict[str, Tensor]
    """Scores by source before their weights, fp64 [B]; --reward_on_error where a source failed."""
    num_errors: dict[str, int]
    """Answers without a score, by source; the reward model has none."""


class Rewards:
    """A weighted sum of the scores of functions, endpoints and, where there is one, the reward model.

    `weights` are by source. The reward model's scores are standardised with `model_scale`, a mean and a
    standard deviation. Raises `UserError` where a function cannot be used.
    """

    def __init__(
        self,
        settings: RewardSourceArguments,
        weights: Mapping[str, float],
        tokenizer: PreTrainedTokenizerBase,
        columns: tuple[str, ...],
        *,
        model_scale: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self._tokenizer = tokenizer
        self._model_scale = model_scale
        self._weights = weights
        self._score_on_error = settings.reward_on_error
        self._columns = columns
        self._named: set[tuple[str, str]] = set()
        self._num_failures: Counter[tuple[str, str]] = Counter()
        available = tuple(column_name(name) for name in columns)
        self._sources: list[RewardFunction | RewardEndpoint] = [
            RewardFunction(
                spec,
                batch_size=settings.reward_batch_size,
                seconds=settings.reward_timeout,
                available=available,
            )
            for spec in settings.reward_function
        ]
        self._sources += [
            RewardEndpoint(
                name,
                url,
                batch_size=settings.reward_batch_size,
                seconds=settings.reward_endpoint_timeout,
                retries=settings.reward_endpoint_retries,
            )
            for name, url in settings.endpoints.items()
        ]

    def score(
        self,
        rollout: RolloutBatch,
        indices: list[Tensor],
        prompts: Rows,
        model_scores: Tensor | None,
        *,
        in_evaluation: bool = False,
    ) -> RewardParts:
        """Score the answers of all ranks; `indices` are those of this rank's, which it scores itself.

        `prompts` is the rollout's data set with its column row, `model_scores` [B] are of all ranks. Failures
        of evaluations are counted apart from those of training. Every rank must call it. Raises `UserError`,
        on all ranks, where a source cannot go on.
        """
        device = rollout.input_ids.device
        mine = torch.cat(indices).to(device)
        answers = self._as_text(rollout.rows(mine), prompts)
        scored, fatal = self._ask(answers) if mesh().tensor.rank == 0 else (self._unasked(answers), "")
        self._agree(scored, answers, fatal)
        table = [[s if isinstance(s, float) else float("nan") for s in scores] for scores in scored.values()]
        own = torch.tensor(table, dtype=torch.float64, device=device).T.contiguous()
        own = sum_across_ranks(own, axis="tensor")  # each answer is judged once: a source may waver
        every = gather_rows(own, axis="data")[gather_rows(mine, axis="data").argsort()]
        failed = every.isnan()
        occasions = "evaluations" if in_evaluation else "rollout batches"
        self._check_failures(occasions, dict(zip(scored, failed.all(dim=0).tolist(), strict=True)))
        every = every.masked_fill(failed, self._score_on_error)
        by_source = dict(zip(scored, every.unbind(dim=1), strict=True))
        if model_scores is not None:
            mean, std = self._model_scale
            by_source = {REWARD_MODEL: (model_scores.double() - mean) / std, **by_source}
        weighted = (self._weights[name] * scores for name, scores in by_source.items())
        total = sum(weighted, start=torch.zeros_like(every[:, 0]))
        num_errors = dict(zip(scored, failed.sum(dim=0).tolist(), strict=True))
        return RewardParts(total.float(), by_source, num_errors)

    def _as_text(self, batch: RolloutBatch, prompts: Rows) -> TextAnswers:
        rows = [json.loads(row) for row in prompts[batch.prompt_rows.cpu().numpy()]["row"].to_pylist()]
        return TextAnswers(
            prompts=prompt_texts(batch, self._tokenizer),
            answers=answer_texts(batch, self._tokenizer),
            columns={column_name(name): [row.get(name) for row in rows] for name in self._columns},
        )

    def _ask(self, answers: TextAnswers) -> tuple[dict[str, list[Score]], str]:
        """Scores by source, and "" or the message of an error that ends the run."""
        scored: dict[str, list[Score]] = {}
        for source in self._sources:
            try:
                scored[source.name] = source.score(answers)
            except UserError as error:
                return {}, str(error)
        return scored, ""

    def _unasked(self, answers: TextAnswers) -> dict[str, list[Score]]:
        """Zeros in place of scores, on the tensor ranks that read the same answers as the first."""
        return {source.name: [0.0] * len(answers.answers) for source in self._sources}

    def _agree(self, scored: dict[str, list[Score]], answers: TextAnswers, fatal: str) -> None:
        """Report on rank 0 what went wrong for the first time on any rank; raise on all what ends the run."""
        first: dict[tuple[str, str], list[Any]] = {}
        for name, scores in scored.items():
            for place, problem in enumerate(scores):
                if isinstance(problem, Problem) and (name, problem.kind) not in self._named:
                    example = [answers.answers[place], answers.prompts[place]]
                    first.setdefault(
                        (name, problem.kind), [name, problem.kind, problem.text, *map(_shown, example)]
                    )
        reports = all_gather_object([fatal, list(first.values())], axis="world")
        for name, kind, *what in (report for _, problems in reports for report in problems):
            if (name, kind) not in self._named:
                messages.info(self._message(name, *what))
            self._named.add((name, kind))
        for message, _ in reports:
            if message:
                raise UserError(message)

    def _message(self, name: str, problem: str, answer: str, prompt: str) -> str:
        return (
            f"reward {name}: {problem}; answer {answer} to {prompt}. It counts as {self._score_on_error:g} "
            f"(--reward_on_error); further ones of this kind are only counted (reward_errors_{name})."
        )

    def _check_failures(self, occasions: str, has_failed: dict[str, bool]) -> None:
        """Raise `UserError` for a source that has had no score for any answer too often in a row."""
        for name, failed in has_failed.items():
            count = self._num_failures[occasions, name] + 1 if failed else 0
            self._num_failures[occasions, name] = count
            if count >= MAX_FAILURES:
                raise UserError(
                    f"reward {name} had no score for any answer of {MAX_FAILURES} {occasions} in a row: "
                    "there is nothing to learn from. What went wrong is named above; correct it."
                )


def build_rewards(
    settings: RewardSourceArguments,
    weights: Mapping[str, float],
    tokenizer: PreTrainedTokenizerBase,
    columns: tuple[str, ...],
    model_scale: tuple[float, float],
) -> Rewards | None:
    """The sources that the flags name; None where the reward model alone scores. Raises `UserError`."""
    if not settings.has_sources:
        return None
    return Rewards(settings, weights, tokenizer, columns, model_scale=model_scale)


def _shown(text: str, limit: int = 80) -> str:
    return repr(text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}")
