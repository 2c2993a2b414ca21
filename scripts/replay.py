"""One PPO step of a run again, bit by bit, with every number of its answers, token by token.

    python scripts/replay.py output/step3_ppo --step 12 --prompt 3
    python scripts/replay.py output/step3_ppo --step 12 --with kl_coef=0.2

The run's own arguments.json says how, and the nearest checkpoint before the step from where; the PPO steps
between are run again first. The metrics are compared with the run's line in metrics.jsonl. --with says what
would have been: the step once more from the same weights, with another value of a flag. The run's folder is
read and never written. A run of several ranks is replayed on as many:

    torchrun --nproc_per_node 2 scripts/replay.py output/step3_ppo --step 12

Exit code 1 where a metric is not the logged one to the last bit.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.arguments import STARTING, ReadableParser, RlhfArguments, Setting, parse_arguments
from dschat.console import messages
from dschat.errors import UserError
from dschat.program import prepare, readable_errors
from dschat.runs.atomic_folder import damage, write_json
from dschat.runs.output_folder import ARGUMENTS, METRICS, finished_checkpoints
from dschat.runs.registry import MEASURED

NAME, PAGE = "replay.json", "replay.html"

WHAT_IFS = (
    *("kl_coef", "kl_estimator", "kl_in", "ratio_clip", "ratio_clip_high", "dual_clip", "value_clip"),
    *("entropy_coef", "target_approx_kl", "gamma", "gae_lambda", "reward_clip", "missing_eos_penalty"),
    *("whiten_advantages", "rollout_correction", "tis_cap", "unsup_coef", "temperature", "top_p", "top_k"),
)
"""Flags that act within one PPO step, and that no checkpoint holds the effect of."""
OWN = (*STARTING, "output_dir")
"""Flags of the run that the replay sets itself."""
UNEQUAL = ("seconds", "per_second", "peak_share", "memory")
"""Parts of the names of metrics that no two runs have in common."""


@dataclass(frozen=True)
class Replay:
    """A PPO step to run again."""

    run: Path
    step: int
    """Counted from 1."""
    args: RlhfArguments
    checkpoint: Path | None
    """Where it starts from, None for the beginning of the run."""
    logged: dict[str, Any]
    """The step's line in metrics.jsonl."""
    what_if: RlhfArguments | None
    """The arguments with the flags of --with, None without any."""
    prompts: tuple[int, ...]
    """Numbers of the prompts shown, from 1."""
    output: Path


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = ReadableParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="Output folder of a run of step 3.")
    add("--step", type=int, required=True, help="The PPO step, counted from 1 as in metrics.jsonl.")
    add(
        "--prompt",
        type=int,
        nargs="+",
        default=[1, 2, 3],
        help="Prompts of the step whose answers are shown, by their number from 1 (default 1 2 3).",
    )
    add(
        "--with",
        dest="what_if",
        action="append",
        default=[],
        metavar="FLAG=VALUE",
        help="Run the step once more with another value of a flag of step 3, and show what changes; repeat "
        "it for more flags. What does not decide what is learned, such as where a model is, holds for both.",
    )
    add(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="Where replay.html and replay.json go (default: beside RUN, RUN_replay_STEP).",
    )
    args = parser.parse_args(argv)
    if args.step < 1:
        raise UserError(f"--step must be at least 1, got {args.step}: PPO steps are counted from 1.")
    if min(args.prompt) < 1:
        raise UserError(f"--prompt must be at least 1, got {min(args.prompt)}: prompts are counted from 1.")
    args.run = args.run.expanduser().resolve()
    args.output = (args.output or args.run.with_name(f"{args.run.name}_replay_{args.step}")).resolve()
    if args.output.is_relative_to(args.run):
        raise UserError(f"--output {args.output} is in the run's folder, which stays as it is; name another.")
    return args


def plan(args: argparse.Namespace) -> Replay:
    """The step to run again. Raises `UserError`, before a model is loaded, for what cannot be."""
    logged = _logged(args.run, args.step)
    base = ["--config", str(args.run / ARGUMENTS)]  # flags after it win
    settings = _parsed(base, quiet=True).description.settings
    values = dict(_setting(word, settings) for word in args.what_if)
    base += [f"--{name}={value}" for name, value in values.items() if name not in WHAT_IFS]
    what_if = [f"--{name}={value}" for name, value in values.items() if name in WHAT_IFS]
    before = (args.step - 1) * _parsed(base, quiet=True).updates_per_ppo_step
    checkpoint = _nearest(args.run / "checkpoints", before)
    _check_ranks(args.run, checkpoint)
    number = os.getppid() if "RANK" in os.environ else os.getpid()  # the same on all ranks
    base += ["--output_dir", str(args.output / f".run-{number}")]
    base += ["--resume_from_checkpoint", str(checkpoint)] if checkpoint else []
    return Replay(
        args.run,
        args.step,
        _parsed(base),
        checkpoint,
        logged,
        _parsed([*base, *what_if], quiet=True) if what_if else None,
        tuple(dict.fromkeys(args.prompt)),
        args.output,
    )


def _parsed(words: list[str], *, quiet: bool = False) -> RlhfArguments:
    """Flags of step 3, checked as those of a command line; `quiet` leaves its notes out."""
    with contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext():
        args = parse_arguments("rlhf", words)
    assert isinstance(args, RlhfArguments), "they are of step 3"
    return args


def _logged(run: Path, step: int) -> dict[str, Any]:
    """The step's line in the metrics of a run. Raises `UserError` where the run or the step is not there."""
    arguments = run / ARGUMENTS
    if not arguments.is_file():
        inner = run / "step3_ppo"
        meant = f"did you mean {inner}?" if (inner / ARGUMENTS).is_file() else "name one of step 3."
        raise UserError(f"{run} is not the output folder of a run, as it has no {ARGUMENTS}; {meant}")
    try:
        is_ppo = "rlhf" in json.loads(arguments.read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError as error:
        raise UserError(f"{run} has no {METRICS}: no PPO step has ended there yet.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{run}: {ARGUMENTS} or {METRICS} cannot be read ({error}).") from error
    if not is_ppo:
        raise UserError(f"{run} is a run of another step; a replay is of PPO, so name a folder of step 3.")
    of_steps = (line for line in lines if not any(name.startswith(MEASURED) for name in line))
    steps = {line["step"]: line for line in of_steps if line["step"] > 0}
    if step not in steps:
        known = f"the PPO steps {min(steps)} to {max(steps)}" if steps else "no PPO step yet"
        raise UserError(f"--step {step}: {run / METRICS} has {known}.")
    return steps[step]


def _setting(word: str, settings: Mapping[str, Setting]) -> tuple[str, str]:
    """Name and value of a --with. Raises `UserError` for a flag that a replay cannot change."""
    name, equals, value = word.partition("=")
    name = name.strip().lstrip("-").replace("-", "_")
    if not (equals and name):
        raise UserError(f"--with {word} is not of the form FLAG=VALUE, such as kl_coef=0.2.")
    if name not in settings:
        parse_arguments("rlhf", [f"--{name}={value}"])  # whose error says what was meant
    if name in OWN or (name not in WHAT_IFS and settings[name].at_resume != "free"):
        raise UserError(
            f"--with {word}: --{name} acts on more than one PPO step, or says how a run is started, so a "
            f"replay cannot change it; it can change {', '.join(WHAT_IFS)}."
        )
    return name, value


def _nearest(root: Path, most: int) -> Path | None:
    """The intact checkpoint of the most optimiser steps, but at most `most`; damaged ones are named."""
    numbers = {root / name: int(name.removeprefix("step_")) for name in finished_checkpoints(root)}
    for path in sorted((path for path in numbers if numbers[path] <= most), key=numbers.__getitem__)[::-1]:
        problem = damage(path)
        if problem is None:
            return path
        messages.warning(f"checkpoint {path} is passed over: {problem}.")
    return None


def _check_ranks(run: Path, checkpoint: Path | None) -> None:
    """Raise `UserError` where the run had another number of ranks, which any of its checkpoints tells."""
    root = run / "checkpoints"
    known = [checkpoint] if checkpoint else [root / name for name in finished_checkpoints(root)][:1]
    here = int(os.environ.get("WORLD_SIZE", 1))
    for path in known:
        ranks = json.loads((path / "progress.json").read_text(encoding="utf-8")).get("world_size", here)
        if ranks != here:
            start = f"torchrun --nproc_per_node {ranks}" if ranks > 1 else "python"
            raise UserError(
                f"{run} is of {ranks} rank{'s' * (ranks > 1)} and this replay of {here}, where sums round "
                f"otherwise: start it with {start} {shlex.join(sys.argv)}"
            )


def run_again(replay: Replay) -> dict[str, Any]:
    """The step as it was, and with --with as it would have been: the content of replay.json.

    Every rank must call it.
    """
    from dschat.distributed.mesh import mesh
    from scripts.replay_record import answers_of, changes, prompts_of
    from scripts.replay_stage import Stage
    from step3_ppo.main import assemble

    args, what_if = replay.args, replay.what_if
    run = assemble(args, prepare(args))
    stage = Stage(run, args)
    num_between = stage.go_to(replay.step - 1, comes_back=what_if is not None)
    is_evaluated = "eval_score" in replay.logged
    was = stage.step(replay.step, is_evaluated=is_evaluated)
    found: dict[str, Any] = {
        "run": str(replay.run),
        "ppo_step": replay.step,
        "checkpoint": str(replay.checkpoint) if replay.checkpoint else None,
        "steps_between": num_between,
        "ranks": mesh().world.size,
        **compared(replay.logged, was.metrics),
    }
    num_prompts = len(prompts_of(was))
    if max(replay.prompts) > num_prompts:
        messages.note(f"--prompt {max(replay.prompts)} is left out: the PPO step has {num_prompts} prompts.")
    chosen = tuple(number for number in replay.prompts if number <= num_prompts)
    tokenizer = run.tokenizers.actor
    found["answers"] = answers_of(was, chosen, tokenizer, args.ppo.ratio_clips)
    if what_if is None:
        return found
    changed = differing_flags(args, what_if)
    coef = what_if.ppo.kl_coef if "kl_coef" in changed else None
    would_be = Stage(run, what_if, kl_coef=coef).step(replay.step, is_evaluated=is_evaluated)
    metrics = {
        name: [value, would_be.metrics.get(name)]
        for name, value in was.metrics.items()
        if is_comparable(name) and would_be.metrics.get(name) != value
    }
    found["what_if"] = {
        "flags": changed,
        "metrics": metrics,
        "same_metrics": sorted(name for name in was.metrics if is_comparable(name) and name not in metrics),
        "columns": changes(was, would_be),
        "same_columns": sorted(was.columns.keys() - changes(was, would_be).keys()),
        "answers": answers_of(would_be, chosen, tokenizer, what_if.ppo.ratio_clips),
    }
    return found


def differing_flags(args: RlhfArguments, others: RlhfArguments) -> dict[str, list[Any]]:
    """Both values of each flag that differs."""
    before, after = args.description.settings, others.description.settings
    return {
        name: [setting.value, after[name].value]
        for name, setting in before.items()
        if setting.value != after[name].value
    }


def is_comparable(name: str) -> bool:
    """Whether two runs of the same step have the metric in common."""
    return name != "step" and not any(part in name for part in UNEQUAL)


def compared(logged: Mapping[str, Any], replayed: Mapping[str, Any]) -> dict[str, Any]:
    """The names of equal metrics, both values of different ones, and what was logged but not replayed."""
    names = [name for name in logged if is_comparable(name)]
    return {
        "equal": [name for name in names if name in replayed and replayed[name] == logged[name]],
        "different": {
            name: [logged[name], replayed[name]]
            for name in names
            if name in replayed and replayed[name] != logged[name]
        },
        "not_replayed": [name for name in names if name not in replayed],
        "metrics": dict(replayed),
    }


def say(found: Mapping[str, Any], folder: Path) -> None:
    """Print what was found."""
    from scripts.replay_page import both_shown

    start, between = found["checkpoint"] or "the beginning of the run", found["steps_between"]
    way = f" over {between} PPO step(s) between" if between else ""
    messages.info(f"PPO step {found['ppo_step']} of {found['run']} again, from {start}{way}:")
    num_equal, different = len(found["equal"]), found["different"]
    if different:
        messages.info(f"  {len(different)} of {num_equal + len(different)} metrics are not the logged ones:")
        for name, (was, now) in different.items():
            messages.info(f"    {name}: logged {was!r}, now {now!r}")
    else:
        messages.info(f"  equal to the last bit in all {num_equal} metrics that were logged")
    if found["not_replayed"]:
        messages.info(f"  not computed by a replay: {', '.join(found['not_replayed'])}")
    what_if = found.get("what_if")
    if what_if:
        flags = (f"--{name} {new} in place of {old}" for name, (old, new) in what_if["flags"].items())
        messages.info(f"with {', '.join(flags) or 'the same flags'}:")
        for name, (was, now) in what_if["metrics"].items():
            messages.info(f"  {name}: {' -> '.join(both_shown(was, now))}")
        messages.info(f"  unchanged metrics: {', '.join(what_if['same_metrics']) or 'none'}")
        messages.info(f"  of the answers change: {', '.join(what_if['columns']) or 'no numbers'}")
        messages.info(f"  the same to the last bit: {', '.join(what_if['same_columns']) or 'none'}")
    messages.info(f"token by token: {folder / PAGE}, all numbers: {folder / NAME}")


def main(argv: Sequence[str] | None = None) -> int:
    """Replay, compare, write, say; returns the exit code."""
    replay = plan(parse(argv))
    folder, scratch = replay.output, Path(replay.args.run.output_dir or "")
    is_first = int(os.environ.get("RANK", 0)) == 0
    folder.mkdir(parents=True, exist_ok=True)
    try:
        found = run_again(replay)
    finally:
        if is_first:
            shutil.rmtree(scratch, ignore_errors=True)
    if is_first:
        from dschat.reports.page import write_page
        from scripts.replay_page import replay_page

        write_json(folder / NAME, found)
        write_page(folder / PAGE, replay_page(found), "--output")
        say(found, folder)
    return int(bool(found["different"]))


if __name__ == "__main__":
    with readable_errors():
        code = main()
        from dschat.distributed.process_group import destroy_process_group

        destroy_process_group(code)
    sys.exit(code)
