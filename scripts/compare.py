"""Answers of several models to the same prompts, side by side; for the demo task, how many of them are right.

    python scripts/compare.py --model SFT=output/step1_sft --model PPO=output/step3_ppo/actor \\
        --data-path pairs.jsonl --num-shown 3
    python scripts/compare.py --model ... --prompt "Name a river."

Every model is asked in its own chat template. Sampling is seeded: the same command prints the same answers.
With --reference NAME the mean KL divergence per answer to that model is estimated, and --demo-task checks
every answer by the rules of scripts/demo_task.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dschat.data.comparisons import Prompt

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from dschat.command_line import ReadableParser
from dschat.console import PLAIN, printable
from dschat.errors import UserError, readable_errors


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = ReadableParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
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
    add("--temperature", type=float, default=1.0, help="Sampling temperature (default 1).")
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
    return prompts[: args.num_prompts or None]


def as_text(prompt: Prompt) -> str:
    """A prompt for people: text as it is, of a conversation every message."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in prompt)


@dataclass(frozen=True)
class Answers:
    """What a model said: text, and the token ids that KL is measured on (each prompt's and answer's)."""

    texts: list[str]
    prompt_ids: list[list[int]]
    answer_ids: list[list[int]]


def load(path: str, flag: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM in fp32 (bf16 on a GPU) and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    from dschat.models.factory import create_hf_model
    from dschat.models.model_folder import check_model_path
    from dschat.models.tokenizer import load_tokenizer

    check_model_path(path, flag)
    tokenizer = load_tokenizer(path)
    gpu = torch.cuda.is_available()
    config = {"bf16": {"enabled": gpu}, "zero_optimization": {"stage": 0}}
    model = create_hf_model(AutoModelForCausalLM, path, tokenizer, config)
    return model.to("cuda" if gpu else "cpu").eval(), tokenizer


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    args: argparse.Namespace,
) -> Answers:
    """Answer every prompt, in batches of similar length; an answer's ids include its end token."""
    import torch

    from dschat.data.templates import ChatTemplate
    from dschat.data.tokenization import Encoder

    torch.manual_seed(args.seed)
    prompt_ids = Encoder(tokenizer).prompts(prompts)
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda row: len(prompt_ids[row]))
    settings = {"do_sample": False} if args.greedy else {
        "do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0
    }  # fmt: skip
    for start in range(0, len(order), args.batch_size):
        rows = order[start : start + args.batch_size]
        width = max(len(prompt_ids[row]) for row in rows)
        ids = torch.tensor(
            [[tokenizer.pad_token_id] * (width - len(prompt_ids[r])) + prompt_ids[r] for r in rows]
        )
        mask = torch.tensor([[0] * (width - len(prompt_ids[r])) + [1] * len(prompt_ids[r]) for r in rows])
        generated = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=args.max_answer_seq_len,
            use_cache=True,
            **settings,
        )[:, width:].tolist()
        for row, tokens in zip(rows, generated, strict=True):
            end = (
                tokens.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in tokens else len(tokens)
            )
            answers[row] = tokens[:end]
    template = ChatTemplate(tokenizer)
    texts = [template.content(text) for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
    return Answers(texts, prompt_ids, answers)


def log_likelihoods(model: PreTrainedModel, answers: Answers, pad_id: int, batch_size: int) -> list[float]:
    """The log-likelihood of each answer given its prompt, in nats."""
    import torch

    from dschat.losses import token_logprobs

    result = []
    for start in range(0, len(answers.texts), batch_size):
        prompts = answers.prompt_ids[start : start + batch_size]
        replies = answers.answer_ids[start : start + batch_size]
        width = max(len(p) + len(r) for p, r in zip(prompts, replies, strict=True))
        rows = [p + r + [pad_id] * (width - len(p) - len(r)) for p, r in zip(prompts, replies, strict=True)]
        places = torch.arange(width)
        lengths = torch.tensor([[len(p), len(p) + len(r)] for p, r in zip(prompts, replies, strict=True)])
        is_real = (places < lengths[:, 1:]).to(model.device)
        is_answer = ((places >= lengths[:, :1]) & (places < lengths[:, 1:])).to(model.device)
        ids = torch.tensor(rows, device=model.device)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=is_real.long()).logits
            logprobs = token_logprobs(logits[:, :-1], ids[:, 1:])
        result += (logprobs * is_answer[:, 1:]).sum(dim=1).tolist()
    return result


def compare(
    args: argparse.Namespace,
) -> tuple[list[Prompt], dict[str, list[str]], dict[str, dict[str, float]]]:
    """Prompts, the answers of each model, and the figures of each model."""
    prompts = read_prompts(args)
    models = {name: load(path, f"--model {name}=") for name, path in args.models.items()}
    answers, figures = {}, {}
    for name, (model, tokenizer) in models.items():
        start = time.perf_counter()
        said = answer(model, tokenizer, prompts, args)
        print(f"{name}: {len(prompts)} answers in {time.perf_counter() - start:.1f} s", flush=True)
        answers[name] = said.texts
        lengths = [len(ids) for ids in said.answer_ids]
        ended = [bool(ids) and ids[-1] == tokenizer.eos_token_id for ids in said.answer_ids]
        figures[name] = {"answer_length": sum(lengths) / len(prompts), "eos_share": sum(ended) / len(prompts)}
        if args.demo_task:
            from demo_task import check_answer

            pairs = zip(prompts, said.texts, strict=True)
            right = [not check_answer(as_text(prompt), text) for prompt, text in pairs]
            figures[name]["success"] = sum(right) / len(prompts)
        if args.reference is not None:
            pad_id = tokenizer.pad_token_id
            own = log_likelihoods(model, said, pad_id, args.batch_size)
            reference = log_likelihoods(models[args.reference][0], said, pad_id, args.batch_size)
            figures[name]["kl"] = sum(a - b for a, b in zip(own, reference, strict=True)) / len(prompts)
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
