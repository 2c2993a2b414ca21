"""Answers of several models to the same prompts: which are better, by how much, and side by side.

    python scripts/compare.py --model SFT=output/step1_sft --model PPO=output/step3_ppo/actor \\
        --reward-model output/step2_reward --html comparison.html
    python scripts/compare.py --model ... --data-path pairs.jsonl --reward-function checks.py:right
    python scripts/compare.py --model ... --judge http://localhost:8000/v1 --judge-model NAME
    python scripts/compare.py --model ... --prompt "Name a river."

The prompts are those that the models' runs held out, unless --data-path or --prompt name others. Every model
is asked in its own chat template, and answers as in an evaluation of step 3: nothing that a checkpoint ships
for chatting (penalties, forbidden tokens) acts. Sampling is seeded: the same command gives the same answers.
The first model is what the others are compared with: their win rate by each source of scores and by the
judge, with its 95 % interval, and their KL divergence per answer, of the distributions that are sampled from
(--reference NAME: to another model). --demo-task checks every answer by the rules of scripts/demo_task.py.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from dschat.data.comparisons import Prompt
    from dschat.rlhf.answering import Answers, AskedModel
    from scripts.compare_scores import Said

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from dschat.arguments import ReadableParser
from dschat.console.text import PLAIN, printable
from dschat.errors import UserError
from dschat.program import readable_errors
from scripts.compare_prompts import Asked, read_prompts

NUM_ON_PAGE = 20
"""Prompts whose answers a page shows side by side."""
TO_KNOW = (
    *("model", "data-path", "prompt", "num-prompts", "max-answer-seq-len", "reward-model", "judge"),
    *("temperature", "output", "html"),
)
REPEATED = 4
"""Tokens of a piece of an answer that counts as repeated where it stood there before."""
CHECKED = "checked success"
"""The score of the demo task: 1 for a right answer, else 0."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = ReadableParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.to_know = TO_KNOW
    add = parser.add_argument
    add(
        "--model",
        action="append",
        required=True,
        metavar="NAME=PATH",
        help="A model to ask; give one flag a model.",
    )
    add(
        "--data-path",
        metavar="DATA",
        help="Prompts of a data set, as --data_path of the steps takes it, in place of the held-out "
        "ones; its evaluation split where it has one.",
    )
    add(
        "--prompt",
        action="append",
        default=[],
        help="A question, or a dialogue with its marks; several flags give several.",
    )
    add("--num-prompts", type=int, default=0, help="Prompts that are asked; 0: all (default 0).")
    add_sources(parser)
    add("--num-shown", type=int, default=3, help="Prompts shown side by side (default 3).")
    add("--max-answer-seq-len", type=int, default=128, help="Longest answer in tokens (default 128).")
    add("--batch-size", type=int, default=64, help="Prompts answered at once (default 64).")
    add("--greedy", action="store_true", help="Take the likeliest token instead of sampling.")
    add(
        "--temperature",
        type=float,
        default=1.0,
        help="Sampling temperature, which KL is measured at too (default 1).",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        help="Sample from the smallest set of tokens with this probability; 1 is off (default 1).",
    )
    add("--top-k", type=int, default=0, help="Sample from this many likeliest tokens; 0 is off (default 0).")
    add("--seed", type=int, default=1234, help="Decides the samples (default 1234).")
    add(
        "--reference",
        metavar="NAME",
        help="The model that KL divergences are to, in nats per answer (default: the first, where all models "
        "have its tokens).",
    )
    add("--demo-task", action="store_true", help="Check every answer by the rules of the demo task.")
    add("--output", type=Path, metavar="FILE", help="Also write figures, scores and answers as JSON.")
    add("--html", type=Path, metavar="FILE", help="Also write a page.")
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Raise `UserError` for flags that cannot work."""
    args.models = dict(_named(value) for value in args.model)
    if args.reference is not None and args.reference not in args.models:
        raise UserError(f"--reference {args.reference} is none of the models: {', '.join(args.models)}.")
    if len(args.models) < len(args.model):
        raise UserError("--model: two models have one name; give each its own, as in SFT=output/step1_sft.")
    if (args.judge is None) != (args.judge_model is None):
        raise UserError("--judge and --judge-model go together: the URL of an API, and a model there.")
    least = {"batch_size": 1, "max_answer_seq_len": 1, "num_prompts": 0, "num_shown": 0, "seed": 0}
    least["top_k"] = 0
    for name, minimum in least.items():
        value = getattr(args, name)
        if not minimum <= value < 2**63:
            raise UserError(f"--{name.replace('_', '-')} must lie in [{minimum}, 2**63), got {value}.")
    if not 0 < args.temperature < float("inf"):
        raise UserError(
            f"--temperature must be positive, got {args.temperature}; --greedy takes the likeliest token."
        )
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p must lie in (0, 1], got {args.top_p}; 1 is off.")


def add_sources(parser: ReadableParser) -> None:
    """The flags of what scores the answers."""
    add = parser.add_argument
    add(
        "--reward-model",
        action="append",
        default=[],
        metavar="PATH",
        help="A reward model that scores the answers, or NAME=PATH; several flags give several.",
    )
    add(
        "--reward-function",
        action="append",
        default=[],
        metavar="FILE.py:NAME",
        help="A Python function that scores the answers, as --reward_function of step 3 takes it.",
    )
    add(
        "--reward-endpoint",
        action="append",
        default=[],
        metavar="URL",
        help="A server that scores the answers, as --reward_endpoint of step 3 takes it.",
    )
    add(
        "--judge",
        metavar="URL",
        help="An OpenAI-compatible API, such as http://localhost:8000/v1, whose "
        "model says which of two answers is better; asked in both orders.",
    )
    add("--judge-model", metavar="NAME", help="The name of the judge's model there.")


def _named(value: str) -> tuple[str, str]:
    name, separator, path = value.partition("=")
    if not (separator and name and path):
        raise UserError(f"--model {value} is not of the form NAME=PATH, such as SFT=output/step1_sft.")
    return name, path


def as_text(prompt: Prompt) -> str:
    """A prompt for people: text as it is, of a conversation every message."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in prompt)


def ask(model: AskedModel, prompts: list[Prompt], args: argparse.Namespace) -> Answers:
    """What the model answers with these settings."""
    from dschat.arguments import RolloutArguments
    from dschat.rlhf.answering import answer

    settings = RolloutArguments(
        max_answer_seq_len=args.max_answer_seq_len,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        per_device_generation_batch_size=args.batch_size,
    )
    return answer(model, prompts, settings, seed=args.seed, greedy=args.greedy)


@dataclass
class Comparison:
    """What the models answered, and what that is worth."""

    asked: Asked
    answers: dict[str, list[str]]
    figures: dict[str, dict[str, Any]]
    """By model and figure: numbers, and for those with an interval a second figure NAME_interval."""
    scores: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """By source and model, of each answer."""
    wins: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """By source and model, against the first model: 1, 1/2 or 0 for each prompt."""
    verdicts: list[tuple[str, str]] = field(default_factory=list)
    """Sentences about the models against the first, each with the level of a page's verdict."""
    notes: list[str] = field(default_factory=list)

    @property
    def first(self) -> str:
        """The model that the others are compared with."""
        return next(iter(self.answers))


def compare(args: argparse.Namespace) -> Comparison:
    """Ask all models, and compare their answers."""
    from dschat.rlhf.answering import check_vocabularies, load
    from scripts.compare_scores import Said, check_files, reward_models, score_all, text_sources

    check_files(args)
    asked = read_prompts(args)
    print(f"{len(asked.prompts)} prompts: {asked.which}", flush=True)
    for warning in asked.warnings:
        print(f"WARNING: {printable(warning)}.", flush=True)
    models = {name: load(path, f"--model {name}=") for name, path in args.models.items()}
    rewards, sources = (
        reward_models(args),
        text_sources(args, asked.rows),
    )  # before the answers take their time
    found = Comparison(asked, {}, {})
    reference: str | None = args.reference or next(iter(models))
    try:
        check_vocabularies(models, str(reference))
    except UserError:
        if args.reference is not None:
            raise
        found.notes.append("The models have different tokens, so there is no KL divergence between them.")
        reference = None
    said: dict[str, Said] = {}
    for name, model in models.items():
        start = time.perf_counter()
        said[name] = Said(model, ask(model, asked.prompts, args), asked.prompts, asked.rows)
        print(f"{name}: {len(asked.prompts)} answers in {time.perf_counter() - start:.1f} s", flush=True)
    for name, one in said.items():
        found.answers[name] = one.answers.texts
        found.figures[name] = {**one.answers.metrics, "repetition": repetition(one.answers)}
    measure(found, said, args, reference)
    found.scores = score_all(said, rewards, sources)
    if args.demo_task:
        add_demo_task(found)
    add_wins(found, args)
    return found


def measure(
    found: Comparison, said: dict[str, Said], args: argparse.Namespace, reference: str | None
) -> None:
    """Add the KL divergences to the reference."""
    from dschat.reports.statistics import mean
    from dschat.rlhf.answering import log_likelihoods

    if reference is None or (len(said) == 1 and args.reference is None):
        return
    groups = prompt_groups(found.asked.prompts)
    for name, one in said.items():
        own, other = (
            log_likelihoods(model, one.answers, args.temperature)
            for model in (one.model, said[reference].model)
        )
        kl = mean(one.answers.in_order(own - other).double().cpu().numpy(), groups)
        found.figures[name] |= {"kl": kl.value, "kl_interval": [kl.low, kl.high]}


def add_demo_task(found: Comparison) -> None:
    """Add whether the rules of the demo task find answers right, as a score of 0 or 1."""
    import numpy as np
    from demo_task import check_answer

    prompts = list(map(as_text, found.asked.prompts))
    found.scores[CHECKED] = {
        name: np.array([float(not check_answer(*pair)) for pair in zip(prompts, texts, strict=True)])
        for name, texts in found.answers.items()
    }
    for name, right in found.scores[CHECKED].items():
        found.figures[name]["success"] = float(right.mean())


def add_wins(found: Comparison, args: argparse.Namespace) -> None:
    """Add mean scores, win rates against the first model, and what these say."""
    from scripts.compare_scores import estimates, in_words, wins_of

    groups = prompt_groups(found.asked.prompts)
    others = [name for name in found.answers if name != found.first]
    for source, scores in found.scores.items():
        for name, values in scores.items():
            add_estimate(found, name, f"score by {source}", estimates(values, groups))
        found.wins[source] = {name: wins_of(scores[name], scores[found.first]) for name in others}
    if args.judge and others:
        from scripts.judge import Judge

        judge = Judge(args.judge, args.judge_model)
        found.wins["judge"] = judged(judge, found, others)
        found.notes.append(
            f"The judge, {args.judge_model}, was asked in both orders: in {judge.inconsistent} of "
            f"{len(others) * len(groups)} pairs the place decided, which counts as a tie; {judge.unreadable} "
            "had a reply without a verdict."
        )
    for source, wins in found.wins.items():
        for name, values in wins.items():
            win_rate = estimates(values, groups, are_rates=True)
            add_estimate(found, name, f"win rate by {source}", win_rate)
            found.verdicts.append(in_words(name, found.first, source, win_rate))


def judged(judge: Any, found: Comparison, others: list[str]) -> dict[str, np.ndarray]:
    """The judge's wins of the other models against the first."""
    import numpy as np

    prompts = list(map(as_text, found.asked.prompts))
    return {
        name: np.array(judge.wins(prompts, found.answers[name], found.answers[found.first]))
        for name in others
    }


def add_estimate(found: Comparison, name: str, figure: str, estimate: Any) -> None:
    """Add a figure of a model with its interval."""
    found.figures[name] |= {figure: estimate.value, f"{figure}_interval": [estimate.low, estimate.high]}


def prompt_groups(prompts: list[Prompt]) -> np.ndarray:
    """A number for each prompt, the same for equal ones. [N]"""
    import numpy as np

    return np.unique([repr(prompt) for prompt in prompts], return_inverse=True)[1]


def repetition(answers: Answers) -> float:
    """The mean over answers of the share of their pieces of `REPEATED` tokens that stood there before."""
    shares = []
    for batch in answers.batches:
        for ids, length in zip(batch.answers.tolist(), batch.answer_lengths.tolist(), strict=True):
            pieces = [tuple(ids[start : start + REPEATED]) for start in range(length - REPEATED + 1)]
            shares.append(1 - len(set(pieces)) / len(pieces) if pieces else 0.0)
    return sum(shares) / len(shares)


def headings(args: argparse.Namespace, found: Comparison) -> dict[str, tuple[str, str]]:
    """Of the figures that are known, heading and format, in the order of tables."""
    to = args.reference or found.first
    known = {}
    for source in found.scores:
        is_share = source == CHECKED
        heading, form = (source, "{:.1%}") if is_share else (f"score by {source}", "{:.3f}")
        known[f"score by {source}"] = heading, form
    for source in (one for one in found.wins if one != CHECKED):  # a share of 0 and 1 says it itself
        known |= {f"win rate by {source}": (f"wins against {found.first} by {source}", "{:.1%}")}
    known |= {
        "kl": (f"KL to {to} (nats)", "{:.3f}"),
        "answer_length": ("answer length (tokens)", "{:.1f}"),
        "eos_share": ("ended by itself", "{:.1%}"),
        "repetition": ("repeated", "{:.1%}"),
    }
    has = {name for values in found.figures.values() for name in values}
    return {name: shown for name, shown in known.items() if name in has}


def cells(
    values: dict[str, Any], shown: dict[str, tuple[str, str]], *, with_intervals: bool = True
) -> list[str]:
    """A model's figures for a table."""
    found = []
    for name, (_, form) in shown.items():
        cell = form.format(values[name]) if name in values else "-"
        interval = values.get(f"{name}_interval")
        if with_intervals and interval and all(map(math.isfinite, interval)):
            cell += " ({} to {})".format(*map(form.format, interval))
        found.append(cell)
    return found


def show(args: argparse.Namespace, found: Comparison) -> None:
    """Print answers side by side, the table, and what it says."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    side_by_side = Table(title="the same prompts, side by side", show_lines=True)
    side_by_side.add_column("prompt", ratio=2)
    for name in found.answers:
        side_by_side.add_column(name, ratio=2)
    for row, prompt in enumerate(found.asked.prompts[: args.num_shown]):
        row_cells = [Text(printable(as_text(prompt).strip()))]
        for texts in found.answers.values():
            cell = Text(printable(_shortened(texts[row].strip())))
            if args.demo_task:
                from demo_task import check_answer

                faults = check_answer(as_text(prompt), texts[row])
                cell.append("\n" + ("right" if not faults else "wrong: " + ", ".join(faults)), style="dim")
            row_cells.append(cell)
        side_by_side.add_row(*row_cells)
    shown = headings(args, found)
    table = Table(title=f"over {len(found.asked.prompts)} prompts")
    table.add_column("model")
    for heading, _ in shown.values():
        table.add_column(heading, justify="right")
    for name, values in found.figures.items():
        table.add_row(name, *cells(values, shown, with_intervals=False))  # JSON and the page have them
    console = Console(**PLAIN)
    if side_by_side.row_count:
        console.print(side_by_side)
    console.print(table)
    for line in [*found.notes, *(sentence for sentence, _ in found.verdicts)]:
        console.print(printable(line))


def _shortened(text: str, limit: int = 400) -> str:
    return text if len(text) <= limit else text[:limit] + " ..."


def as_json(args: argparse.Namespace, found: Comparison) -> dict[str, Any]:
    """Everything, for JSON: figures by model, and of each prompt the answers and scores."""
    samples = [
        {
            "prompt": as_text(prompt),
            "answers": {name: texts[row] for name, texts in found.answers.items()},
            "scores": {
                source: {name: _or_none(values[row]) for name, values in scores.items()}
                for source, scores in found.scores.items()
            },
            "wins": {
                source: {name: _or_none(values[row]) for name, values in wins.items()}
                for source, wins in found.wins.items()
            },
        }
        for row, prompt in enumerate(found.asked.prompts)
    ]
    sampling = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "greedy", "seed")}
    sampling["max_answer_seq_len"] = args.max_answer_seq_len
    return {
        "prompts": {"number": len(samples), "which": found.asked.which, "warnings": found.asked.warnings},
        "models": dict(args.models),
        "first": found.first,
        "sampling": sampling,
        "verdicts": [sentence for sentence, _ in found.verdicts],
        "notes": found.notes,
        "figures": {
            name: {figure: _or_none(value) for figure, value in values.items()}
            for name, values in found.figures.items()
        },
        "samples": samples,
    }


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(argv: Sequence[str] | None = None) -> None:
    """Ask, score, print, write."""
    args = parse(argv)
    found = compare(args)
    show(args, found)
    from dschat.reports.page import write_page
    from scripts.compare_page import as_page

    if args.output is not None:
        write_page(args.output, json.dumps(as_json(args, found), indent=2) + "\n", "--output")
    if args.html is not None:
        write_page(args.html, as_page(args, found), "--html")
        print(f"the same as a page: {args.html}", flush=True)


if __name__ == "__main__":
    with readable_errors():
        main()
