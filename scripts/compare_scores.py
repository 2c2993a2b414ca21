"""What the answers of a comparison are worth: by reward models, functions and endpoints, and a judge."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dschat.console import messages
from dschat.errors import UserError
from dschat.reports.statistics import Estimate, mean, rate

if TYPE_CHECKING:
    from dschat.data.comparisons import Prompt
    from dschat.rlhf.answering import Answers, AskedModel


@dataclass(frozen=True)
class Said:
    """A model and what it answered."""

    model: AskedModel
    answers: Answers
    prompts: list[Prompt]
    rows: list[dict[str, Any]]


def reward_model_names(paths: list[str]) -> dict[str, str]:
    """The paths of --reward-model by the names that they have in tables; NAME=PATH gives one."""
    found: dict[str, str] = {}
    for number, value in enumerate(paths, start=1):
        name, separator, path = value.partition("=")
        default = "reward model" if len(paths) == 1 else f"reward model {number}"
        found[name if separator else default] = path if separator else value
    return found


def reward_models(args: argparse.Namespace) -> dict[str, AskedModel]:
    """Those of --reward-model by their names. Raises `UserError`."""
    from dschat.rlhf.answering import load_reward_model

    names = reward_model_names(args.reward_model)
    return {name: load_reward_model(path, "--reward-model") for name, path in names.items()}


def score_all(
    said: dict[str, Said], rewards: dict[str, AskedModel], sources: list[Any]
) -> dict[str, dict[str, np.ndarray]]:
    """Scores [N] by reward model or other source and model, NaN where an answer has none.

    Raises `UserError`.
    """
    scores = {name: by_reward_model(reward, said) for name, reward in rewards.items()}
    for source in sources:
        scores[source.name] = {name: by_text(source, one) for name, one in said.items()}
    for source, of_models in scores.items():
        for name, values in of_models.items():
            if np.isnan(values).all():
                raise UserError(f"{source} gives none of the answers of {name} a score.")
    return scores


def by_reward_model(reward: AskedModel, said: dict[str, Said]) -> dict[str, np.ndarray]:
    """A reward model's scores of every model's answers."""
    from dschat.rlhf.answering import reward_scores

    return {
        name: reward_scores(reward, one.model, one.prompts, one.answers).double().numpy()
        for name, one in said.items()
    }


def text_sources(args: argparse.Namespace, rows: list[dict[str, Any]]) -> list[Any]:
    """The functions and endpoints, which read text. Raises `UserError` for one that cannot be used."""
    from dschat.arguments import RewardSourceArguments
    from dschat.rlhf.rewards.endpoint import RewardEndpoint
    from dschat.rlhf.rewards.function import RewardFunction
    from dschat.rlhf.rewards.sources import column_name

    settings = RewardSourceArguments(
        reward_function=args.reward_function, reward_endpoint=args.reward_endpoint
    )
    available = tuple(sorted({column_name(name) for row in rows for name in row}))
    size, seconds = settings.reward_batch_size, settings.reward_timeout
    functions = [
        RewardFunction(spec, batch_size=size, seconds=seconds, available=available)
        for spec in settings.reward_function
    ]
    endpoints = [
        RewardEndpoint(
            name,
            url,
            batch_size=size,
            seconds=settings.reward_endpoint_timeout,
            retries=settings.reward_endpoint_retries,
        )
        for name, url in settings.endpoints.items()
    ]
    return [*functions, *endpoints]


def by_text(source: Any, one: Said) -> np.ndarray:
    """A function's or an endpoint's scores of a model's answers."""
    from dschat.rlhf.rewards.retokenize import prompt_texts
    from dschat.rlhf.rewards.sources import column_name
    from dschat.rlhf.rewards.text_answers import Problem, TextAnswers

    texts = [text for batch in one.answers.batches for text in prompt_texts(batch, one.model.tokenizer)]
    places = np.concatenate([batch.prompt_rows.cpu().numpy() for batch in one.answers.batches])
    prompts = [texts[place] for place in np.argsort(places)]
    names = sorted({name for row in one.rows for name in row})
    columns = {column_name(name): [row.get(name) for row in one.rows] for name in names}
    scores = source.score(TextAnswers(prompts, one.answers.texts, columns))
    problems = [score.text for score in scores if isinstance(score, Problem)]
    if problems:
        messages.warning(
            f"{source.name} has no score for {len(problems)} of {len(scores)} answers: {problems[0]}"
        )
    return np.array([score if isinstance(score, float) else np.nan for score in scores])


def wins_of(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """1 where a score is higher than the other model's, 1/2 where equal, 0 where lower, NaN without one."""
    return (1 + np.sign(scores - others)) / 2


def estimates(values: np.ndarray, groups: np.ndarray, *, are_rates: bool = False) -> Estimate:
    """The mean of the values that are known, with its interval, equal prompts taken together."""
    known = ~np.isnan(values)
    return (rate if are_rates else mean)(values[known], groups[known])


def in_words(name: str, first: str, source: str, wins: Estimate) -> tuple[str, str]:
    """What a win rate says, and the level of a page's verdict."""
    number = f"wins {wins.shown('.1%')} against {first} by {source}"
    if wins.low > 0.5:
        return f"{name} is better than {first}: {number}", "good"
    if wins.high < 0.5:
        return f"{name} is worse than {first}: {number}", "bad"
    return f"{name} is no different from {first} by more than noise: {number}", "neutral"


def check_files(args: argparse.Namespace) -> None:
    """Raise `UserError` for a checker that is no file and a report that has no folder."""
    for spec in args.reward_function:
        file = Path(spec.rpartition(":")[0])
        if not file.is_file():
            raise UserError(f"--reward-function {spec}: {file} is no file; name it as FILE.py:NAME.")
    for flag, path in (("--output", args.output), ("--html", args.html)):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"{flag} {path}: there is no folder {path.parent}; make it, or name another.")
