"""What the parts of a PPO step cost that are no model passes: against answers, ranks, length and vocabulary.

python benchmarks/scaling.py --output benchmarks/results/scaling.md

Each part is called on made-up answers of growing number and length, on one thread, and the slope of a line
through the logarithms of size and cost is stated: 1 is a cost in proportion to the size, 2 one that grows
with its square, 0 none. Seconds are of the processor, which a busy machine hardly moves; memory is the
process's largest during the call beyond what it held before, the result included. Gathers are measured on
rank 0.
"""

import argparse
import ctypes
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, help="Markdown file to write beside what is printed.")
    parser.add_argument(
        "--share", type=int, default=1, help="Divide the sizes by this, 1 to 64, for a short run."
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if not 1 <= args.share <= 64:
        parser.error(f"--share {args.share} is not from 1 to 64: sizes would be too few for a slope.")
    if args.output and not args.output.resolve().parent.is_dir():
        parser.error(f"--output {args.output}: there is no such folder.")
    return args


if __name__ == "__main__":
    parse()  # before torch is imported, so that --help and a mistyped flag answer at once

import psutil
import torch
import versus_report
from torch import Tensor

from dschat.arguments import PpoArguments
from dschat.distributed.mesh import mesh
from dschat.distributed.process_group import destroy_process_group, init_process_group
from dschat.losses import group_advantages
from dschat.rlhf.analysis import ModelOutputs
from dschat.rlhf.experience import (
    AnalyzedRollout,
    AnswerAnalysis,
    Experience,
    MinibatchSampler,
    ScoreShaping,
    estimate_advantages,
    shape_rewards,
)
from dschat.rlhf.rollout.batch import RolloutBatch, gather_rollouts
from dschat.rlhf.rollout.keyed_sampling import TokenDraw, keyed_uniforms

MEBIBYTE = 2**20
SMALL = 0.5
"""MiB below which memory is the allocator's, and no slope is stated."""
PPO = PpoArguments()
ANSWERS_A_PROMPT = 4


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a part is called on."""

    answers: int = 1024
    """Of all ranks."""
    length: int = 128
    """Tokens of the longest answer, and of the longest prompt."""
    vocabulary: int = 4096
    ranks: int = 1


@dataclass(frozen=True)
class Cost:
    """What a call took on one rank."""

    seconds: float
    """Of the processor."""
    mebibytes: float


def made_up_rollout(size: Size, *, answers: int | None = None) -> RolloutBatch:
    """Answers of random lengths to random prompts, four to each prompt."""
    rows, length = size.answers if answers is None else answers, size.length
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, size.vocabulary, (rows, 2 * length), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (2, rows, 1), generator=generator)
    columns = torch.arange(length)
    answer_mask = columns < lengths[1]
    return RolloutBatch(
        input_ids=ids,
        attention_mask=torch.cat([columns >= length - lengths[0], answer_mask], dim=1).long(),
        answer_mask=answer_mask,
        ended=torch.ones(rows, dtype=torch.bool),
        prompt_rows=torch.arange(rows) // ANSWERS_A_PROMPT,
        prompt_length=length,
    )


def made_up_analysis(size: Size) -> AnswerAnalysis:
    """Random numbers in the place of what models say."""
    generator = torch.Generator().manual_seed(1)
    of_tokens = torch.randn(4, size.answers, size.length, generator=generator)
    return AnswerAnalysis(*of_tokens, scores=torch.randn(size.answers, generator=generator))


def made_up_experience(size: Size) -> Experience:
    """Experience in optimiser steps of a quarter of the answers, in micro-batches of 16."""
    rollout, analysis = made_up_rollout(size), made_up_analysis(size)
    sampler = MinibatchSampler(
        micro_batch_size=16, accumulation_steps=max(size.answers // 64, 1), world_size=1, rank=0, seed=0
    )
    analyzed = AnalyzedRollout(rollout, analysis, ScoreShaping(5.0, 0.0), kl_coef=0.1, ppo_step=0)
    assert analysis.values is not None
    return Experience.of(analyzed, analysis.logprobs, analysis.values, PPO, sampler)


def gather_of_rollouts(size: Size) -> Callable[[], object]:
    """This rank's answers become those of all ranks."""
    mine = made_up_rollout(size, answers=size.answers // mesh().data.size)
    return lambda: gather_rollouts([mine], pad_token_id=0)


def gather_of_analyses(size: Size) -> Callable[[], object]:
    """What the models say of this rank's answers, in micro-batches of 16, becomes that of all ranks."""
    ranks = mesh().data.size
    one = replace(size, answers=size.answers // ranks)
    analysis = made_up_analysis(one)
    rows = [part[mesh().data.rank :: ranks] for part in torch.arange(size.answers).split(16 * ranks)]
    columns = (analysis.logprobs, analysis.entropy, analysis.ref_logprobs, analysis.values, analysis.scores)
    by_part = zip(*(column.split(16) for column in columns), strict=True)
    parts = [ModelOutputs(*part) for part in by_part]
    return lambda: ModelOutputs.gather(parts, rows, size.length)


def rewards_and_advantages(size: Size) -> Callable[[], object]:
    """Shaped rewards, advantages with a critic, and whitening."""
    rollout, analysis = made_up_rollout(size), made_up_analysis(size)
    sampler = MinibatchSampler(16, 1, 1, 0, 0)
    analyzed = AnalyzedRollout(rollout, analysis, ScoreShaping(5.0, 0.0), kl_coef=0.1, ppo_step=0)

    def call() -> Experience:
        rewards = shape_rewards(analysis.scores, analysis, rollout.answer_mask, PPO, kl_coef=0.1)
        advantages, returns = estimate_advantages(rewards, analysis.values, rollout, PPO)
        return Experience.of(analyzed, advantages, returns, PPO, sampler)

    return call


def comparison_of_answers(size: Size) -> Callable[[], object]:
    """Each answer's score against those of the other answers to its prompt, as in RLOO."""
    rollout, scores = made_up_rollout(size), made_up_analysis(size).scores
    return lambda: group_advantages(scores, rollout.prompt_rows, "rloo")


def minibatches_of_a_pass(size: Size) -> Callable[[], object]:
    """One pass over the experience, a micro-batch after the other."""
    experience = made_up_experience(size)

    def call() -> None:
        for minibatch in experience.minibatches(0):
            del minibatch

    return call


def metrics_of_the_answers(size: Size) -> Callable[[], object]:
    """The metrics of a rollout batch."""
    experience = made_up_experience(size)
    return experience.metrics


def uniform_numbers(size: Size) -> Callable[[], object]:
    """The keyed number that each token is drawn with."""
    keys = torch.arange(2 * size.answers, dtype=torch.int32).view(-1, 2)
    return lambda: keyed_uniforms(keys, size.length)


def a_token_of_each_answer(size: Size) -> Callable[[], object]:
    """One decoding step's draw from the logits; answers are the rows that are decoded together."""
    logits: Tensor = torch.randn(size.answers, size.vocabulary, generator=torch.Generator().manual_seed(0))
    uniforms = torch.linspace(0.01, 0.99, size.answers, dtype=torch.float64)
    draw = TokenDraw(num_tokens=size.vocabulary, with_logprobs=True)
    return lambda: draw(logits, uniforms)


PARTS: dict[str, Callable[[Size], Callable[[], object]]] = {
    "gather of rollouts": gather_of_rollouts,
    "gather of analyses": gather_of_analyses,
    "rewards, advantages, whitening": rewards_and_advantages,
    "comparison of answers (RLOO)": comparison_of_answers,
    "minibatches of a pass": minibatches_of_a_pass,
    "metrics": metrics_of_the_answers,
    "keyed numbers": uniform_numbers,
    "draw of a token": a_token_of_each_answer,
}
GATHERS = ("gather of rollouts", "gather of analyses")
DECODING = "draw of a token"
BESIDE_MODELS = tuple(name for name in PARTS if name != DECODING)

ANSWERS, LENGTHS, VOCABULARIES, RANKS, DECODED = (
    (1024, 2048, 4096, 8192, 16384),
    (64, 128, 256, 512, 1024),
    (4096, 16384, 65536, 131072),
    (1, 2, 4),
    (16, 32, 64, 128, 256),
)


def divided(sizes: Sequence[int], share: int, multiple_of: int) -> list[int]:
    """The sizes divided by the share, in whole multiples, each once."""
    return list(dict.fromkeys(max(size // share // multiple_of, 1) * multiple_of for size in sizes))


def series(share: int = 1) -> Iterator[tuple[str, str, list[Size]]]:
    """Part, axis and sizes of each line of the table; `share` divides the sizes, for a short run."""
    for part in BESIDE_MODELS:
        yield part, "answers", [Size(answers=number) for number in divided(ANSWERS, share, 64)]
        if part != "comparison of answers (RLOO)":
            yield part, "length", [Size(length=number) for number in divided(LENGTHS, share, 8)]
    (answers,) = divided([4096], share, 64)
    for part in GATHERS:
        yield part, "ranks", [Size(answers=answers, ranks=number) for number in RANKS]
    yield DECODING, "answers", [Size(answers=number) for number in DECODED]
    vocabularies = divided(VOCABULARIES, share, 64)
    yield DECODING, "vocabulary", [Size(answers=32, vocabulary=number) for number in vocabularies]


def measure(part: str, size: Size, *, repeats: int = 5) -> Cost:
    """The median processor time of some calls, and the memory of one more."""
    call = PARTS[part](size)
    call()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    before = resident_after_reset()
    result = call()
    most = peak_resident() - before
    del result
    return Cost(median(seconds), most)


def resident_after_reset() -> float:
    """MiB that this process holds, without what is free in its heap; its peak begins anew.

    See clear_refs in man 5 proc. Linux with glibc alone.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss / MEBIBYTE


def peak_resident() -> float:
    """The most MiB since `resident_after_reset`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Of the line with the least squared distance through the logarithms: the exponent of the growth."""
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return above / sum((a - x_mean) ** 2 for a in x)


def line(part: str, axis: str, sizes: Sequence[Size], costs: Sequence[Cost]) -> str:
    """A row of the table."""
    along = [getattr(size, axis) for size in sizes]
    seconds, mebibytes = [cost.seconds for cost in costs], [cost.mebibytes for cost in costs]
    growth = f"{slope(along, mebibytes):.2f}" if min(mebibytes) > SMALL else ""
    cells = [
        *(part, f"{axis} {along[0]:,} to {along[-1]:,}"),
        f"{', '.join(f'{1000 * value:.3g}' for value in seconds)}",
        f"{slope(along, seconds):.2f}",
        f"{', '.join(f'{value:.3g}' for value in mebibytes)}",
        growth,
    ]
    return f"| {' | '.join(cells)} |"


def table(results: Sequence[tuple[str, str, list[Size], list[Cost]]]) -> str:
    """Markdown."""
    head = [
        "| part | against | processor ms | slope | MiB | slope |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(line(*result) for result in results)])


def measure_on_ranks(wanted: Sequence[tuple[str, Size]], ranks: int) -> list[Cost]:
    """The costs of parts on rank 0 of so many processes of one thread."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    request = json.dumps([(part, asdict(size)) for part, size in wanted])
    result = subprocess.run(
        [*launcher, __file__, "--measure", request],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return [Cost(**cost) for cost in json.loads(result.stdout.splitlines()[-1])]


def as_worker(request: str) -> None:
    """Measure what `measure_on_ranks` asks for; rank 0 prints the costs."""
    init_process_group()
    torch.set_num_threads(1)
    costs = [asdict(measure(part, Size(**size))) for part, size in json.loads(request)]
    if mesh().is_main_process:
        print("\n" + json.dumps(costs), flush=True)
    destroy_process_group()


def report(share: int) -> str:
    """Measure everything and say it, with machine and versions."""
    wanted = list(series(share))
    costs: dict[tuple[str, Size], Cost] = {}
    for ranks in sorted({size.ranks for _, _, sizes in wanted for size in sizes}):
        asked = {(part, size): None for part, _, sizes in wanted for size in sizes if size.ranks == ranks}
        costs |= zip(asked, measure_on_ranks(list(asked), ranks), strict=True)
    results = [(part, axis, sizes, [costs[part, size] for size in sizes]) for part, axis, sizes in wanted]
    of_run = f"`python benchmarks/scaling.py{f' --share {share}' if share > 1 else ''}`"
    lines = [
        "# What a PPO step costs beside its model passes",
        "",
        f"{of_run}: medians of 5 calls on one thread, numbers in fp32. {versus_report.machine()}; "
        f"Python {platform.python_version()}, torch {torch.__version__}.",
        "",
        f"What is not varied is {Size().answers:,} answers of up to {Size().length} tokens, to prompts of up "
        f"to as many, on 1 rank. Gathers against ranks have {divided([4096], share, 64)[0]:,} answers in "
        f"all; draws have a vocabulary of {Size().vocabulary:,} or 32 rows. MiB are the most during a call "
        "beyond what the process held before, the result included.",
        "",
        table(results),
        "",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if args.measure:
        as_worker(args.measure)
        return
    text = report(args.share)
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
