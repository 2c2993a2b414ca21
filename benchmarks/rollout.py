"""Milliseconds of a decode step and tokens per second of every way to generate, beside the bandwidth's floor.

python benchmarks/rollout.py --model 6m
python benchmarks/rollout.py --device cuda --model opt-1.3b --batch 64 --prompt 256 --answer 128

Weights are random, prompts are random tokens padded on the left. A decode step is what an answer's further
tokens cost: the time of all of them less the time of one, over their number. Ways take turns. The floor is
the time to read the weights once and the keys and values so far, at the measured bandwidth of the memory; a
model that fits the cache of a CPU is not bound by it.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", choices=("6m", "89m", "opt-350m", "opt-1.3b"), default="6m", help="OPT's layout by size.")
    add("--model-folder", type=Path, help="A model's folder instead.")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="Where to generate (default cpu).")
    add("--batch", type=int, default=32, help="Answers at once (default 32).")
    add("--prompt", type=int, default=128, help="Longest prompt in tokens (default 128).")
    add("--answer", type=int, default=128, help="Tokens of each answer (default 128).")
    add("--rounds", type=int, default=3, help="Measurements of each way, in turns (default 3).")
    add("--only", nargs="+", help="These ways alone, by their names in the table.")
    add(
        "--processor-time",
        action="store_true",
        help="Of the process, not the clock; for one thread on a CPU.",
    )
    add("--json", action="store_true", help="Print one JSON object.")
    args = parser.parse_args()
    for name, least in (("batch", 1), ("prompt", 1), ("answer", 2), ("rounds", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)} is below {least}.")
    if args.model_folder and not (args.model_folder / "config.json").is_file():
        parser.error(f"--model-folder {args.model_folder}: no config.json is there.")
    return args


if __name__ == "__main__":
    parse()  # before torch is imported, so that --help and a mistyped flag answer at once

import torch
from hand_written_decode import HandWrittenDecode
from random_models import SHAPES, random_model, require_device, word_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from versus_marks import median

from dschat.data.collate import PromptBatch
from dschat.models.config import head_width
from dschat.rlhf.rollout.backend import RolloutBackend, Sampling
from dschat.rlhf.rollout.continuous import ContinuousBatching
from dschat.rlhf.rollout.hf_generate import HuggingFaceGenerate
from dschat.rlhf.rollout.static_decoding import StaticDecoding

GENERATE, HAND_WRITTEN = "generate()", "hand-written loop"
"""The yardsticks: transformers' sampling, and a loop for OPT that knows no more than it must."""

Way = Callable[[int], object]
"""Generates answers of so many tokens."""


class PlainEngine:
    """A model where a back end expects DeepSpeed's engine."""

    def __init__(self, model: Any) -> None:
        self.module, self.training = model.eval(), False

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    def eval(self) -> None:
        """Nothing to change: it is never trained."""

    def train(self, mode: bool = True) -> None:
        """Likewise."""

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def main() -> None:
    """Measure and print."""
    args = parse()
    require_device(args.device)
    device = torch.device(args.device)
    if args.model_folder:
        tokenizer = AutoTokenizer.from_pretrained(args.model_folder)
        model = AutoModelForCausalLM.from_pretrained(args.model_folder, dtype=torch.bfloat16).to(device)
    else:
        tokenizer = word_tokenizer(SHAPES[args.model]["vocab_size"])
        model = random_model(args.model, tokenizer, device=args.device, dtype=torch.bfloat16)
    prompts = random_prompts(args.batch, args.prompt, len(tokenizer)).to(device)
    clock = clock_of(args)
    engine = PlainEngine(model)
    ways = dict(all_ways(engine, tokenizer, prompts, args.answer, only=args.only))
    times, failed = decode_times(ways, args.answer, args.rounds, clock)
    found = {
        "batch": args.batch,
        "ms_per_step": times,
        "chosen": chosen(times, takes_continuous=takes_continuous(engine, tokenizer)),
        "failed": failed,
        "floor_ms": floor_ms(model, args),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }
    print(json.dumps(found) if args.json else table(found))


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    """What tells the time, once the device is idle."""

    def now() -> float:
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if args.processor_time else time.perf_counter()

    return now


def random_prompts(batch: int, longest: int, num_tokens: int) -> PromptBatch:
    """Prompts of half of the longest length and more, padded on the left."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(max(1, longest // 2), longest + 1, (batch,), generator=generator)
    lengths[0] = longest
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    tokens = torch.randint(2, num_tokens, (batch, longest), generator=generator)
    numbers = torch.arange(batch)
    return PromptBatch(torch.where(mask.bool(), tokens, 1), mask, numbers, numbers, torch.zeros_like(numbers))


def back_ends(engine: PlainEngine, tokenizer: Any, longest: int) -> dict[str, Callable[[], RolloutBackend]]:
    """Those of this project, for rows of up to `longest` tokens."""
    plain = HuggingFaceGenerate(engine, tokenizer)  # type: ignore[arg-type]

    def static(mode: str) -> RolloutBackend:
        backend = StaticDecoding(plain, longest=longest)
        with backend.session():
            backend.mode = mode
        return backend

    trial = StaticDecoding(plain, longest=longest)
    with trial.session():
        modes = trial.modes()
    statics = {f"static, {mode}": functools.partial(static, mode) for mode in modes}
    return {"hf": lambda: plain, "continuous": lambda: ContinuousBatching(plain), **statics}


def all_ways(
    engine: PlainEngine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptBatch,
    longest: int,
    *,
    only: list[str] | None,
) -> Iterator[tuple[str, Way]]:
    """Our back ends, transformers' own sampling, and the loop by hand."""
    model, columns = engine.module, prompts.input_ids.shape[1] + longest
    sampling = Sampling(max_answer_length=longest, seed=1, with_logprobs=True)

    def of_back_end(make: Callable[[], RolloutBackend]) -> Way:
        backend = make()

        def generate(length: int) -> object:
            with backend.session():
                return backend.generate(prompts, replace(sampling, max_answer_length=length))

        return generate

    ways: dict[str, Callable[[], Way]] = {
        name: functools.partial(of_back_end, make)
        for name, make in back_ends(engine, tokenizer, columns).items()
    }
    ways[GENERATE] = lambda: functools.partial(generate_by_transformers, model, prompts)
    ways[HAND_WRITTEN] = lambda: functools.partial(
        HandWrittenDecode(model, len(prompts.keys), columns).generate,
        prompts.input_ids,
        prompts.attention_mask,
    )
    if unknown := set(only or ()) - ways.keys():
        raise SystemExit(f"--only {' '.join(sorted(unknown))}: no such way; here are {'; '.join(ways)}.")
    for name, make in ways.items():
        if only is None or name in only:
            yield name, make()


@torch.no_grad()
def generate_by_transformers(model: Any, prompts: PromptBatch, length: int) -> Tensor:
    """transformers' generate with its own sampling, as TRL calls it: no keys, no record of log-
    probabilities."""
    return model.generate(
        input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, do_sample=True, top_k=0,
        min_new_tokens=length, max_new_tokens=length,
    )  # fmt: skip


def decode_times(
    ways: dict[str, Way], longest: int, rounds: int, clock: Callable[[], float]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Milliseconds of a decode step of each way, of each round; and why a way failed."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    failed: dict[str, str] = {}
    for number in range(rounds + 1):  # the first allocates and builds kernels
        for name, generate in ways.items():
            if name in failed:
                continue
            moments = [clock()]
            try:
                for length in (1, longest):
                    generate(length)
                    moments.append(clock())
            except Exception as error:  # what one way cannot do must not hide the others
                failed[name] = f"{type(error).__name__}: {error}"
                continue
            first, all_tokens = moments[1] - moments[0], moments[2] - moments[1]
            if number:
                times[name].append((all_tokens - first) / (longest - 1) * 1e3)
    return {name: values for name, values in times.items() if values}, failed


def takes_continuous(engine: PlainEngine, tokenizer: Any) -> bool:
    """Whether --rollout_backend auto times continuous batching."""
    return ContinuousBatching(HuggingFaceGenerate(engine, tokenizer)).has_flash_attention  # type: ignore[arg-type]


def chosen(times: dict[str, list[float]], *, takes_continuous: bool = True) -> str:
    """Our fastest back end, which --rollout_backend auto takes; continuous only with FlashAttention."""
    others = (GENERATE, HAND_WRITTEN, *(() if takes_continuous else ("continuous",)))
    own = {name: median(values) for name, values in times.items() if name not in others}
    return min(own, key=own.__getitem__) if own else ""


def floor_ms(model: Any, args: argparse.Namespace) -> float:
    """Milliseconds to read the weights and the keys and values of half-grown answers once."""
    config, size = model.config, torch.bfloat16.itemsize
    weights = sum(p.numel() for p in model.parameters()) * size
    columns = args.prompt + args.answer / 2
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cache = 2 * config.num_hidden_layers * args.batch * columns * heads * head_width(config) * size
    return (weights + cache) / bandwidth(torch.device(args.device)) * 1e3


def bandwidth(device: torch.device, gibibytes: float | None = None) -> float:
    """Bytes a second that the device's memory gives to a sum over an array that no cache holds."""
    count = int((gibibytes or (2 if device.type == "cuda" else 0.5)) * 2**30 / 4)
    array = torch.ones(count, device=device)
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        array.sum()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return count * 4 / best


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"{found['device']}, batch {found['batch']}; bandwidth's floor {found['floor_ms']:.2f} ms",
        "",
        "| way | ms a decode step | tokens/s | floor / measured |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, values in found["ms_per_step"].items():
        time_of_step = median(values)
        lines.append(
            f"| {name}{' (chosen)' if name == found['chosen'] else ''} "
            f"| {time_of_step:.2f} ({min(values):.2f} to {max(values):.2f}) "
            f"| {found['batch'] / time_of_step * 1e3:,.0f} | {found['floor_ms'] / time_of_step:.0%} |"
        )
    return "\n".join([*lines, *(f"{name} failed: {why}" for name, why in found["failed"].items())])


if __name__ == "__main__":
    main()
