"""Before the first PPO step: whether the reward model is worth it, told by `dschat forecast`."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from dschat.arguments import RlhfArguments
from dschat.console import messages
from dschat.distributed.collectives import broadcast_from_rank_0
from dschat.errors import UserError
from dschat.export.eval_command import run_on_rank_0, shown
from dschat.runs.output_folder import FORECAST

PROGRAM = Path(__file__).resolve().parents[1] / "scripts" / "forecast.py"
SHARE = 4
"""Without being asked for a forecast samples at most a `SHARE`-th of the run's answers. Its answers cost less
than those of the run, which learns from them."""
PROMPTS, ANSWERS = (100, 200), (16, 64)
"""The fewest and the most held-out prompts and answers per prompt of a forecast that nobody has asked for."""


def check_worth(args: RlhfArguments, num_answers: int, held_out: int) -> None:
    """Make the forecast that is asked for, or one by the second reward model where it is cheap.

    `num_answers` are those that all ranks sample in the run, `held_out` its prompts for evaluation. A run
    that goes on has its forecast. Every rank must call it. Raises `UserError` where the reward model is not
    worth PPO and `--force` is not given, and where a forecast that is asked for cannot be made.
    """
    settings, output_dir = args.forecast, args.run.output_dir
    if not settings.words and (args.reward_path is None or args.rewards.has_sources):
        return
    if settings.words and not output_dir:
        raise UserError("--forecast needs --output_dir, in which it is written.")
    folder = Path(output_dir or "")
    if not output_dir or settings.forecast == "none" or broadcast_from_rank_0((folder / FORECAST).exists):
        return
    guard = args.guard.guard_reward_model_name_or_path
    words = settings.words or cheap_words(guard if guard != args.reward_path else None, num_answers, held_out)
    if not words:
        return
    messages.info(f"forecast of whether the reward model is worth PPO, before the first PPO step: {folder}")
    flags = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    command = [sys.executable, str(PROGRAM), *flags, "--output", output_dir, *words]
    ended, lines = run_on_rank_0(shlex.join(command))
    told = broadcast_from_rank_0(lambda: read(folder / FORECAST))
    if told is None:
        problem = f"the forecast ended with exit code {ended}: {shown(lines)}"
        if settings.forecast:
            raise UserError(f"--forecast: {problem}")
        messages.warning(f"{problem}. The run goes on without it.")
        return
    page = (folder / FORECAST).with_suffix(".html")
    if not (told["is_worth_it"] or settings.force):
        raise UserError(
            f"{told['verdict']} ({page}). Nothing was trained. Get a better reward model, or train all the "
            "same with --force."
        )
    advice = f". For PPO: {told['advice']}" if told["advice"] else ""
    messages.info(f"forecast: {told['verdict']}{advice} ({page})")


def cheap_words(guard: str | None, num_answers: int, held_out: int) -> list[str]:
    """The flags of a forecast that nobody has asked for; none where it is left out, which is said."""
    if guard is None:
        messages.info(
            "whether this reward model is worth PPO is told before PPO by --forecast, or dschat forecast: it "
            "takes a function, a second reward model or a judge that you believe more (docs/forecast.md)"
        )
        return []
    fewest, most = ANSWERS
    prompts = min(held_out, PROMPTS[1], num_answers // (fewest * SHARE))
    if prompts < PROMPTS[0]:
        messages.info(
            f"no forecast of whether the reward model is worth PPO: unasked it takes {PROMPTS[0]} held-out "
            f"prompts ({held_out} are), and {fewest} answers to each within 1/{SHARE} of the run's "
            f"({num_answers}); --forecast '--gold_reward_model {guard}' makes one"
        )
        return []
    answers = fewest
    while 2 * answers <= most and 2 * answers * prompts * SHARE <= num_answers:
        answers *= 2
    return ["--gold_reward_model", guard, "--num_prompts", str(prompts), "--num_answers", str(answers)]


def read(path: Path) -> dict[str, Any] | None:
    """What a forecast says in short; None where there is none."""
    if not path.is_file():
        return None
    told = json.loads(path.read_text(encoding="utf-8"))
    return {name: told[name] for name in ("is_worth_it", "verdict", "advice")}
