"""Is the reward model worth PPO? A forecast from best-of-n of the SFT model, before anything is trained.

    python scripts/forecast.py --gold_function check.py:is_right FLAGS_OF_STEP_3...
    python scripts/forecast.py --gold_reward_model output/other_reward FLAGS_OF_STEP_3...

The SFT model (--actor_model_name_or_path) answers held-out prompts many times, and the reward model picks the
best of n answers. What is believed of those ("gold"), by a function or by a second reward model that learned
from other pairs, tells how far optimising the reward model helps: gold against KL, the KL at which it turns,
and with that --kl_target and --max_kl for PPO. The prompts are those that step 3 holds out with these flags.

One process. Writes FOLDER/forecast.html and forecast.json. Exit code 1 where the reward model is not worth
PPO, unless --force.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.arguments import ReadableParser, RewardSourceArguments, RlhfArguments, parse_arguments
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

NAME, PAGE = "forecast.json", "forecast.html"
LEAST_PROMPTS = 20
"""Held-out prompts below which an interval over prompts means nothing."""


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
    add("--num_answers", type=int, default=64, help="Answers to each prompt, the largest n (default 64).")
    add("--num_prompts", type=int, default=200, help="Held-out prompts (default 200).")
    add("--output", type=Path, default=Path("forecast"), metavar="FOLDER", help="Default: forecast.")
    add("--force", action="store_true", help="Exit with 0 whatever the forecast says.")
    own_words, words = parser.own_words(sys.argv[1:] if argv is None else argv)
    own = parser.parse_args(own_words)
    if not (own.gold_function or own.gold_reward_model):
        raise UserError(
            "nothing says what good answers are: give --gold_function FILE.py:NAME, a program that checks "
            "answers, or --gold_reward_model, a reward model that learned from other pairs."
        )
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
            samples_per_prompt=self._own.num_answers,
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


def run(own: argparse.Namespace, args: RlhfArguments) -> dict[str, Any]:
    """Sample, score, forecast: the content of forecast.json."""
    import torch

    from dschat.reports.best_of_n import forecast

    sampled = Sampled(own, args)
    clock = [time.perf_counter()]
    batches = sampled.answers()
    clock.append(time.perf_counter())
    raw = sampled.by_model(batches, "reward")
    clock.append(time.perf_counter())
    gold = sampled.gold(batches)
    clock.append(time.perf_counter())
    ended, rows = (torch.cat([getattr(b, name) for b in batches]) for name in ("ended", "prompt_rows"))
    by_prompt = rows.view(-1, own.num_answers)
    assert (by_prompt == by_prompt[:, :1]).all(), "the answers to a prompt stand together"
    if not (raw.isfinite().all() and gold.isfinite().all()):
        raise UserError("not every score is finite, so nothing can be told; a reward model may need fp32.")
    table = {
        name: values.double().view(by_prompt.shape).cpu().numpy()
        for name, values in (("shaped", sampled.shaped(raw, ended)), ("raw", raw), ("gold", gold))
    }
    found = forecast(table["shaped"], table["raw"], table["gold"])
    seconds = dict(zip(("sampling", "scoring", "gold"), map(float.__sub__, clock[1:], clock), strict=True))
    return {
        "actor": args.actor.model_name_or_path,
        "reward_model": args.reward_path,
        "gold": own.gold_function or own.gold_reward_model,
        "num_prompts": len(by_prompt),
        "num_answers": own.num_answers,
        "eos_share": ended.double().mean().item(),
        "verdict": found.verdict,
        "is_worth_it": found.is_worth_it,
        **{name: getattr(found, name) for name in ("turns", "kl_target", "max_kl")},
        **{name: asdict(getattr(found, name)) for name in ("turning_kl", "peak")},
        "points": [asdict(point) for point in found.points],
        "seconds": seconds,
        "fooled": fooled(sampled, batches, table),
    }


def fooled(
    sampled: Sampled, batches: list[RolloutBatch], table: dict[str, np.ndarray], count: int = 5
) -> list[dict[str, Any]]:
    """Answers that the reward model takes for the best, with the least gold beside the prompt's others."""
    taken = table["shaped"].argmax(axis=1)
    gold = table["gold"]
    lost = gold[range(len(gold)), taken] - gold.mean(axis=1)
    prompts = [int(place) for place in lost.argsort(kind="stable")[:count] if lost[place] < 0]
    places = [place * gold.shape[1] + int(taken[place]) for place in prompts]
    return [
        {
            "prompt": prompt,
            "answer": answer,
            "score": float(table["raw"][place, taken[place]]),
            "gold": float(gold[place, taken[place]]),
            "mean_gold": float(gold[place].mean()),
        }
        for place, (prompt, answer) in zip(prompts, sampled.texts(batches, places), strict=True)
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
    messages.info(found["verdict"])
    if found["kl_target"] is not None:
        messages.info(f"for PPO: --kl_target {found['kl_target']:.2g} --max_kl {found['max_kl']:.2g}")
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
