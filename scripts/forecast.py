"""Is the reward model worth PPO? A forecast from best-of-n of the SFT model, before anything is trained.

    python scripts/forecast.py --gold_function check.py:is_right FLAGS_OF_STEP_3...
    python scripts/forecast.py --gold_reward_model output/other_reward FLAGS_OF_STEP_3...
    python scripts/forecast.py --judge http://localhost:8000/v1 --judge_model NAME FLAGS_OF_STEP_3...

The SFT model (--actor_model_name_or_path) answers held-out prompts many times, and the reward model picks the
best of n answers. What is believed of those ("gold"), by a function, by a second reward model that learned
from other pairs, or by a judge, tells how far optimising the reward model helps: gold against KL, the KL at
which it turns, and with that --kl_target and --max_kl for PPO. The prompts are those that step 3 holds out
with these flags. A judge's gold is how often the best of n wins against one more answer of the SFT model.

One process. Writes FOLDER/forecast.html and forecast.json. Exit code 1 where the reward model is not worth
PPO, unless --force.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.arguments import (
    ReadableParser,
    RewardSourceArguments,
    RlhfArguments,
    parse_arguments,
    without_secrets,
)
from dschat.console import messages
from dschat.distributed.mesh import mesh
from dschat.errors import UserError
from dschat.program import prepare, readable_errors
from dschat.runs.atomic_folder import write_json
from dschat.runs.output_folder import without_infinities

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from dschat.rlhf.rollout.batch import RolloutBatch
    from scripts.judge import Judge

NAME, PAGE = "forecast.json", "forecast.html"
LEAST_PROMPTS = 20
"""Held-out prompts below which an interval over prompts means nothing."""
JUDGED = (1, 2, 4, 8, 16, 32, 64, 128)
"""The n of a judge's curve: each but the first costs two questions per prompt, or none where the best of n
answers is that of half as many."""


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, RlhfArguments]:
    """The flags of this program, and those of step 3. Raises `UserError`."""
    parser = ReadableParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    gold = parser.add_mutually_exclusive_group()
    gold.add_argument(
        "--gold_function",
        metavar="FILE.py:NAME",
        help="What is believed: a function NAME(prompts, answers, **columns) as --reward_function takes it.",
    )
    gold.add_argument(
        "--gold_reward_model",
        metavar="MODEL",
        help="What is believed: a reward model that learned from other pairs than the one in question.",
    )
    gold.add_argument(
        "--judge",
        metavar="URL",
        help="What is believed: an OpenAI-compatible API, such as http://localhost:8000/v1, whose model says "
        "which of two answers is better; asked in both orders about at most 6 pairs per prompt (7 from "
        "--num_answers 128 on).",
    )
    add("--judge_model", "--judge-model", metavar="NAME", help="The name of the judge's model there.")
    add("--num_answers", type=int, default=64, help="Answers to each prompt, the largest n (default 64).")
    add("--num_prompts", type=int, default=200, help="Held-out prompts (default 200).")
    add("--output", type=Path, default=Path("forecast"), metavar="FOLDER", help="Default: forecast.")
    add("--force", action="store_true", help="Exit with 0 whatever the forecast says.")
    own_words, words = parser.own_words(sys.argv[1:] if argv is None else argv)
    own = parser.parse_args(own_words)
    if not (own.gold_function or own.gold_reward_model or own.judge):
        raise UserError(
            "nothing says what good answers are: give --gold_function FILE.py:NAME, a program that checks "
            "answers, --gold_reward_model, a reward model that learned from other pairs, or --judge URL, a "
            "language model that compares them."
        )
    if (own.judge is None) != (own.judge_model is None):
        raise UserError("--judge and --judge_model go together: the URL of an API, and a model there.")
    if own.num_answers < 4:
        raise UserError(f"--num_answers must be at least 4, got {own.num_answers}; 64 is usual.")
    if own.num_prompts < LEAST_PROMPTS:
        raise UserError(f"--num_prompts must be at least {LEAST_PROMPTS}, got {own.num_prompts}.")
    if own.gold_reward_model:
        words += ["--guard_reward_model_name_or_path", own.gold_reward_model]
    args: Any = parse_arguments("rlhf", words)
    if args.reward_path is None:
        raise UserError(
            "the forecast is of a reward model, and there is none: give --critic_model_name_or_path or "
            "--reward_model_name_or_path."
        )
    if args.rewards.has_sources:
        raise UserError(
            "--reward_function and --reward_endpoint are summed up with the reward model's scores, and the "
            "forecast is of the reward model alone: leave them out, or give the function as --gold_function."
        )
    if own.gold_reward_model == args.reward_path:
        raise UserError(
            f"--gold_reward_model {own.gold_reward_model} is the reward model in question, which agrees with "
            "itself: give one that learned from other pairs."
        )
    if mesh().world.size > 1:
        raise UserError("the forecast runs in one process: start it with python, without a launcher.")
    return own, args


class Sampled:
    """N answers to each of P held-out prompts, and what the models say of them."""

    def __init__(self, own: argparse.Namespace, args: RlhfArguments) -> None:
        from dschat.data.preparation import prompt_data
        from dschat.rlhf.roles import engine_specs
        from dschat.rlhf.tokenizers import load_rlhf_tokenizers
        from dschat.rlhf.upstream import check_positions, verify_models

        self._own, self._args = own, args
        specs = [spec for spec in engine_specs(args) if spec.role in ("actor", "critic", "reward", "guard")]
        received = verify_models(specs)
        self._tokenizers, self._specs = load_rlhf_tokenizers(specs, args.tokenizer)
        received.check_templates(self._specs, self._tokenizers)
        self._scale = received.score_scale("step2" if args.ppo.score_scale == "step2" else "none")
        data = prompt_data(
            args.data,
            self._tokenizers.actor,
            max_prompt_seq_len=args.rollout.max_prompt_seq_len,
            seed=args.run.seed,
            reward_tokenizer=self._tokenizers.reward_tokenizer,
            keep_rows=own.gold_function is not None,
        )
        self._prompts, self._columns = data.evaluation, data.columns
        self._longest = data.longest + args.rollout.max_answer_seq_len
        check_positions(self._specs, self._tokenizers, self._longest)
        if len(self._prompts) < LEAST_PROMPTS:
            raise UserError(
                f"{len(self._prompts)} prompts are held out and a forecast needs {LEAST_PROMPTS} at least: "
                "give more with --eval_fraction or --eval_data_path."
            )
        self._gold_function = self._function()

    def _function(self) -> Any:
        from dschat.rlhf.rewards.sources import build_rewards

        if not self._own.gold_function:
            return None
        settings = RewardSourceArguments(reward_function=[self._own.gold_function])
        weights = dict.fromkeys(settings.names, 1.0)
        return build_rewards(settings, weights, self._tokenizers.actor, self._columns, (0.0, 1.0))

    def answers(self) -> list[RolloutBatch]:
        """The answers, in batches of one prompt's after another's."""
        from dschat.data.loaders import build_eval_prompts
        from dschat.rlhf.answering import load
        from dschat.rlhf.monitoring.evaluation import EVALUATION
        from dschat.rlhf.rollout.backend import Sampling
        from dschat.rlhf.rollout.choice import build_backend
        from dschat.runs.measured_choices import MeasuredChoices

        rollout = self._args.rollout
        model = load(self._args.actor.model_name_or_path, "--actor_model_name_or_path")
        backend = build_backend(
            rollout,
            model,
            self._tokenizers.actor,
            longest=self._longest,
            choices=MeasuredChoices(measures=False),
        )
        batches = build_eval_prompts(
            self._prompts,
            num_prompts=self._own.num_prompts,
            samples_per_prompt=self._own.num_answers + bool(self._own.judge),
            pad_id=self._tokenizers.actor.pad_token_id,
            batch_size=rollout.per_device_generation_batch_size,
            rank=0,
            world_size=1,
        )
        sampling = replace(Sampling.of(rollout, seed=self._args.run.seed), ppo_step=EVALUATION)
        with backend.session():
            found = [backend.generate(batch.to(model.device), sampling) for batch in batches]
        return [batch.rows((batch.prompt_rows >= 0).nonzero()[:, 0]) for batch in found]

    def by_model(self, batches: list[RolloutBatch], role: str) -> Tensor:
        """The scores of a reward model of that role. [B] over all batches."""
        import torch

        from dschat.models.forward import scores_of
        from dschat.rlhf.answering import load_reward_model
        from dschat.rlhf.roles import spec_of
        from dschat.rlhf.tokenizers import build_retokenizer

        spec = spec_of(self._specs, role)
        assert spec is not None, "there is a model of that role"
        model = load_reward_model(spec.path, spec.flag)
        reading = build_retokenizer(self._specs, role, self._tokenizers, self._prompts)
        with torch.no_grad():
            return torch.cat([scores_of(model, (reading.read(b) if reading else b).tokens) for b in batches])

    def gold(self, batches: list[RolloutBatch]) -> Tensor:
        """What is believed of the answers. [B]"""
        import torch

        if self._gold_function is None:
            return self.by_model(batches, "guard")
        parts = [
            self._gold_function.score(batch, [torch.arange(len(batch.ended))], self._prompts, None)
            for batch in batches
        ]
        failed = sum(sum(part.num_errors.values()) for part in parts)
        if failed:
            raise UserError(
                f"--gold_function {self._own.gold_function} had no score for {failed} of the answers, as the "
                "message above says; a forecast needs one for each."
            )
        return torch.cat([part.scores for part in parts])

    def shaped(self, scores: Tensor, ended: Tensor) -> Tensor:
        """What PPO would learn from: normalised, clipped, less the penalty for a missing end. [B] -> [B]"""
        from dschat.rlhf.score_scale import ScoreScale

        return ScoreScale(self._args.ppo, self._scale).fixed(scores, ended)

    def texts(self, batches: list[RolloutBatch], places: Sequence[int]) -> list[tuple[str, str]]:
        """Prompt and answer at these places of all batches."""
        import torch

        from dschat.rlhf.rewards.retokenize import answer_texts, prompt_texts

        sizes = [len(batch.ended) for batch in batches]
        found = []
        for place in places:
            number = 0
            while place >= sizes[number]:
                place, number = place - sizes[number], number + 1
            one = batches[number].rows(torch.tensor([place], device=batches[number].ended.device))
            tokenizer = self._tokenizers.actor
            found.append((prompt_texts(one, tokenizer)[0], answer_texts(one, tokenizer)[0]))
        return found


@dataclass(frozen=True)
class Believed:
    """Gold of the best of n answers to P prompts, for K sizes n, and of those that are taken for the best."""

    sizes: tuple[int, ...]
    by_n: np.ndarray
    """[P, K]"""
    taken: np.ndarray
    """The answer that the reward model takes for the best of all, [P],"""
    of_taken: np.ndarray
    """its gold [P],"""
    usual: np.ndarray
    """and what is to be expected of an answer to that prompt, [P]."""
    said: str = ""
    """What is to be known of how gold was had."""


def by_scores(shaped: np.ndarray, gold: np.ndarray) -> Believed:
    """Gold by a score of every answer, [P, N] both."""
    from dschat.reports.best_of_n import SIZES, best_of_n

    sizes, taken = tuple(n for n in SIZES if n <= shaped.shape[1]), shaped.argmax(axis=1)
    of_taken = gold[range(len(gold)), taken]
    return Believed(sizes, best_of_n(shaped, gold, sizes), taken, of_taken, gold.mean(axis=1))


def by_judge(judge: Judge, sampled: Sampled, batches: list[RolloutBatch], shaped: np.ndarray) -> Believed:
    """Gold by a judge: the share of prompts where the best of the first n answers wins against the last.

    `shaped` [P, N + 1]. The last answer to a prompt competes with none of the others for being the best, so
    that a win rate of 1/2 is that of the SFT model, which n = 1 has without a question.
    """
    import numpy as np

    num_prompts, width = shaped.shape
    sizes = tuple(n for n in JUDGED if n < width)
    best = np.stack([shaped[:, :n].argmax(axis=1) for n in sizes], axis=1)
    pairs = sorted({(row, int(answer)) for row in range(num_prompts) for answer in best[row, 1:]})
    messages.info(f"the judge is asked {2 * len(pairs)} questions: {len(pairs)} pairs, in both orders")
    texts = sampled.texts(batches, [row * width + answer for row, answer in pairs])
    others = sampled.texts(batches, [row * width + width - 1 for row in range(num_prompts)])
    prompts, answers = zip(*texts, strict=True)
    wins = judge.wins(prompts, answers, [others[row][1] for row, _ in pairs])
    by_pair = dict(zip(pairs, wins, strict=True))
    by_n = np.full(best.shape, 0.5)
    for row in range(num_prompts):
        by_n[row, 1:] = [by_pair[row, int(answer)] for answer in best[row, 1:]]
    said = (
        f"Gold is of the best of the first n answers. The judge was asked about {len(pairs)} pairs in both "
        f"orders: in {judge.inconsistent} the place decided, which counts as a tie; {judge.unreadable} had a "
        "reply without a verdict."
    )
    return Believed(sizes, by_n, best[:, -1], by_n[:, -1], by_n[:, 0], said)


def checked_judge(own: argparse.Namespace) -> Judge | None:
    """The judge, having answered a trial question; None where gold is another. Raises `UserError`."""
    if not own.judge:
        return None
    from scripts.judge import Judge

    judge = Judge(own.judge, own.judge_model)
    judge.wins(["Name a colour."], ["Blue."], ["No."])
    return Judge(own.judge, own.judge_model)


def run(own: argparse.Namespace, args: RlhfArguments) -> dict[str, Any]:
    """Sample, score, forecast: the content of forecast.json."""
    import torch

    from dschat.reports.best_of_n import best_of_n, forecast
    from scripts.forecast_page import advice

    sampled = Sampled(own, args)
    judge = checked_judge(own)
    clock = [time.perf_counter()]
    batches = sampled.answers()
    clock.append(time.perf_counter())
    raw = sampled.by_model(batches, "reward")
    ended, rows = (torch.cat([getattr(b, name) for b in batches]) for name in ("ended", "prompt_rows"))
    by_prompt = rows.view(-1, own.num_answers + bool(judge))
    assert (by_prompt == by_prompt[:, :1]).all(), "the answers to a prompt stand together"

    def table(scores: Tensor) -> np.ndarray:
        if not scores.isfinite().all():
            raise UserError(
                "not every score is finite, so nothing can be told; a reward model may need fp32."
            )
        return scores.double().view(by_prompt.shape).cpu().numpy()

    shaped, shown = table(sampled.shaped(raw, ended)), table(raw)
    clock.append(time.perf_counter())
    if judge:
        gold = by_judge(judge, sampled, batches, shaped)
    else:
        gold = by_scores(shaped, table(sampled.gold(batches)))
    clock.append(time.perf_counter())
    competing = slice(own.num_answers)
    found = forecast(gold.sizes, best_of_n(shaped[:, competing], shown[:, competing], gold.sizes), gold.by_n)
    seconds = dict(zip(("sampling", "scoring", "gold"), map(float.__sub__, clock[1:], clock), strict=True))
    return {
        "actor": args.actor.model_name_or_path,
        "reward_model": args.reward_path,
        "gold": own.gold_function or own.gold_reward_model or judged_by(own),
        "said": gold.said,
        "num_prompts": len(by_prompt),
        "num_answers": own.num_answers,
        "eos_share": ended.double().mean().item(),
        "verdict": found.verdict,
        "is_worth_it": found.is_worth_it,
        **{name: getattr(found, name) for name in ("turns", "kl_target", "max_kl")},
        "advice": advice(found.kl_target, found.max_kl),
        **{name: asdict(getattr(found, name)) for name in ("turning_kl", "peak")},
        "points": [asdict(point) for point in found.points],
        "seconds": seconds,
        "fooled": fooled(sampled, batches, shown, gold),
    }


def judged_by(own: argparse.Namespace) -> str:
    """The judge in words, without what its URL has of secrets."""
    return f"the win rate by the judge {own.judge_model} at {without_secrets(own.judge)}"


def fooled(
    sampled: Sampled, batches: list[RolloutBatch], raw: np.ndarray, gold: Believed, count: int = 5
) -> list[dict[str, Any]]:
    """Answers that the reward model takes for the best, with the least gold beside what is usual."""
    lost = gold.of_taken - gold.usual
    prompts = [int(place) for place in lost.argsort(kind="stable")[:count] if lost[place] < 0]
    texts = sampled.texts(batches, [row * raw.shape[1] + int(gold.taken[row]) for row in prompts])
    return [
        {
            "prompt": prompt,
            "answer": answer,
            "score": float(raw[row, gold.taken[row]]),
            "gold": float(gold.of_taken[row]),
            "mean_gold": float(gold.usual[row]),
        }
        for row, (prompt, answer) in zip(prompts, texts, strict=True)
    ]


def say(found: dict[str, Any], folder: Path) -> None:
    """Print the curve and what follows from it."""
    from rich.console import Console
    from rich.table import Table

    from dschat.console.text import PLAIN

    table = Table(
        title=f"best of n, {found['num_answers']} answers to {found['num_prompts']} held-out prompts"
    )
    for heading in ("n", "KL (nats)", "score", "gold", "gain of gold (95 %)"):
        table.add_column(heading, justify="right")
    for point in found["points"]:
        gain = point["gain"]
        table.add_row(
            str(point["n"]),
            f"{point['kl']:.2f}",
            f"{point['score']['value']:.3f}",
            f"{point['gold']['value']:.3f}",
            f"{gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})",
        )
    Console(**PLAIN).print(table)
    for line in filter(None, (found["said"], found["verdict"])):
        messages.info(line)
    if found["advice"]:
        messages.info(f"for PPO: {found['advice']}")
    spent, answers = sum(found["seconds"].values()), found["num_prompts"] * found["num_answers"]
    messages.info(
        f"{answers} answers in {spent:.0f} s; the page: {folder / PAGE}, all numbers: {folder / NAME}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Forecast, write, say; returns the exit code."""
    own, args = parse(argv)
    from dschat.reports.page import write_page
    from scripts.forecast_page import forecast_page

    prepare(args)
    found = run(own, args)
    own.output.mkdir(parents=True, exist_ok=True)
    write_json(own.output / NAME, without_infinities(found))
    write_page(own.output / PAGE, forecast_page(found), "--output")
    say(found, own.output)
    return int(not (found["is_worth_it"] or own.force))


if __name__ == "__main__":
    with readable_errors():
        sys.exit(main())
