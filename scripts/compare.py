"""Answers of several models to the same prompts, side by side; for the demo task, how many of them are right.

    python scripts/compare.py --model SFT=output/step1_sft --model PPO=output/step3_ppo/actor \\
        --data-path pairs.jsonl --num-shown 3
    python scripts/compare.py --model ... --prompt "Name a river."

Every model is asked in its own chat template, and answers as in an evaluation of step 3: nothing that a
checkpoint ships for chatting (penalties, forbidden tokens) acts. Sampling is seeded: the same command prints
the same answers. With --reference NAME the mean KL divergence per answer to that model is estimated, of the
distributions that are sampled from, and --demo-task checks every answer by the rules of scripts/demo_task.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dschat.data.comparisons import Prompt
    from dschat.rlhf.answering import Answers, AskedModel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from dschat.arguments import ReadableParser
from dschat.console.text import PLAIN, printable
from dschat.errors import UserError
from dschat.program import readable_errors

TO_KNOW = (
    *("model", "data-path", "prompt", "num-prompts", "num-shown", "max-answer-seq-len", "greedy"),
    *("temperature", "reference", "output"),
)


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
        help="What --data_path of the steps takes; its evaluation split where it has one.",
    )
    add(
        "--prompt",
        action="append",
        default=[],
        help="A question, or a dialogue with its marks; several flags give several.",
    )
    add("--num-prompts", type=int, default=0, help="Prompts taken from --data-path; 0 takes all (default 0).")
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
    add("--seed", type=int, default=1234, help="Decides the samples (default 1234).")
    add(
        "--reference",
        metavar="NAME",
        help="Estimate each model's KL divergence to this one, in nats per answer.",
    )
    add("--demo-task", action="store_true", help="Check every answer by the rules of the demo task.")
    add("--output", type=Path, metavar="FILE", help="Also write the figures as JSON.")
    args = parser.parse_args(argv)
    args.models = dict(_named(value) for value in args.model)
    if args.reference is not None and args.reference not in args.models:
        raise UserError(f"--reference {args.reference} is none of the models: {', '.join(args.models)}.")
    if not args.prompt and args.data_path is None:
        raise UserError("nothing to ask: give --data-path or --prompt.")
    least = {"batch_size": 1, "max_answer_seq_len": 1, "num_prompts": 0, "num_shown": 0, "seed": 0}
    for name, minimum in least.items():
        value = getattr(args, name)
        if not minimum <= value < 2**63:
            raise UserError(f"--{name.replace('_', '-')} must lie in [{minimum}, 2**63), got {value}.")
    if not 0 < args.temperature < float("inf"):
        raise UserError(
            f"--temperature must be positive, got {args.temperature}; --greedy takes the likeliest token."
        )
    return args


def _named(value: str) -> tuple[str, str]:
    name, separator, path = value.partition("=")
    if not (separator and name and path):
        raise UserError(f"--model {value} is not of the form NAME=PATH, such as SFT=output/step1_sft.")
    return name, path


def read_prompts(args: argparse.Namespace) -> list[Prompt]:
    """The prompts to ask. Raises `UserError` naming the line of a row without one."""
    from dschat.data.findings import Findings
    from dschat.data.reading import Format, read_comparisons
    from dschat.data.sources import open_source

    prompts: list[Prompt] = list(args.prompt)
    if args.data_path is not None:
        source = open_source(args.data_path, "--data-path", evaluates=True)
        rows = read_comparisons(source, source.evaluation or source.training, Format(), Findings())
        prompts += [row.prompt for row in rows]
    if not prompts:
        raise UserError(f"--data-path {args.data_path} holds no prompts; give other data, or --prompt.")
    return prompts[: args.num_prompts or None]


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
        per_device_generation_batch_size=args.batch_size,
    )
    return answer(model, prompts, settings, seed=args.seed, greedy=args.greedy)


def compare(
    args: argparse.Namespace,
) -> tuple[list[Prompt], dict[str, list[str]], dict[str, dict[str, float]]]:
    """Prompts, the answers of each model, and the figures of each model."""
    from dschat.rlhf.answering import check_vocabularies, load, log_likelihoods

    prompts = read_prompts(args)
    models = {name: load(path, f"--model {name}=") for name, path in args.models.items()}
    if args.reference is not None:
        check_vocabularies(models, args.reference)
    answers, figures = {}, {}
    for name, model in models.items():
        start = time.perf_counter()
        said = ask(model, prompts, args)
        print(f"{name}: {len(prompts)} answers in {time.perf_counter() - start:.1f} s", flush=True)
        answers[name], figures[name] = said.texts, said.metrics
        if args.demo_task:
            from demo_task import check_answer

            pairs = zip(prompts, said.texts, strict=True)
            right = [not check_answer(as_text(prompt), text) for prompt, text in pairs]
            figures[name]["success"] = sum(right) / len(prompts)
        if args.reference is not None:
            own, reference = (
                log_likelihoods(one, said, args.temperature) for one in (model, models[args.reference])
            )
            figures[name]["kl"] = (own - reference).mean().item()
    return prompts, answers, figures


def show(
    args: argparse.Namespace,
    prompts: list[Prompt],
    answers: dict[str, list[str]],
    figures: dict[str, dict[str, float]],
) -> None:
    """Print both tables."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    side_by_side = Table(title="the same prompts, side by side", show_lines=True)
    side_by_side.add_column("prompt", ratio=2)
    for name in answers:
        side_by_side.add_column(name, ratio=2)
    for row, prompt in enumerate(prompts[: args.num_shown]):
        cells = [Text(printable(as_text(prompt).strip()))]
        for texts in answers.values():
            cell = Text(printable(_shortened(texts[row].strip())))
            if args.demo_task:
                from demo_task import check_answer

                faults = check_answer(as_text(prompt), texts[row])
                cell.append("\n" + ("right" if not faults else "wrong: " + ", ".join(faults)), style="dim")
            cells.append(cell)
        side_by_side.add_row(*cells)

    headings = {
        "success": ("checked success", "{:.1%}"),
        "kl": (f"KL to {args.reference} (nats)", "{:.3f}"),
        "answer_length": ("answer length (tokens)", "{:.1f}"),
        "eos_share": ("ended by itself", "{:.1%}"),
    }
    known = [key for key in headings if all(key in values for values in figures.values())]
    table = Table(title=f"over {len(prompts)} prompts")
    table.add_column("model")
    for key in known:
        table.add_column(headings[key][0], justify="right")
    for name, values in figures.items():
        table.add_row(name, *(headings[key][1].format(values[key]) for key in known))
    console = Console(**PLAIN)
    console.print(side_by_side)
    console.print(table)


def _shortened(text: str, limit: int = 400) -> str:
    return text if len(text) <= limit else text[:limit] + " ..."


def main(argv: Sequence[str] | None = None) -> None:
    """Ask, check, print."""
    args = parse(argv)
    prompts, answers, figures = compare(args)
    show(args, prompts, answers, figures)
    if args.output is not None:
        args.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    with readable_errors():
        main()
