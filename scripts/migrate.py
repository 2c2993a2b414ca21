"""A launch script, command line, YAML file or Python program of another project as a command of ours.

    python scripts/migrate.py run_1.3b.sh > run.sh
    python scripts/migrate.py llama3_lora_dpo.yaml
    python scripts/migrate.py --step ppo ppo.py

Reads DeepSpeed-Chat's, ColossalChat's and ms-swift's launch scripts, LLaMA-Factory's and ms-swift's YAML, and
TRL's commands and Python programs for SFT, reward models, DPO and PPO. Prints a shell script: a comment for
each flag (kept, renamed, not there), their defaults where ours are others, and the command. Nothing is run;
what is in <angle brackets> is for you to fill in.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.arguments import ReadableParser, explain_foreign_flag, flags_of, parse_arguments
from dschat.errors import UserError
from dschat.program import readable_errors
from scripts.migrate_sources import Source, read
from scripts.migrate_tables import ACTOR, DEFAULTS, LENGTHS, REWARD_MODEL, RULES, is_true

COMMANDS = {"sft": "sft", "reward": "reward", "dpo": "dpo", "ppo": "rlhf"}
"""The names of the steps in our arguments, by command."""
RENAMED = re.compile(r"here: (--\w+(?: and --\w+)*)(?:,.*)?")
FIXED = re.compile(r"here: --(\w+) (\w+)(?:,.*)?")
ANSWERS = "max_answer_seq_len"


@dataclass
class Translation:
    """Our flags with their values, and what there is to say of each of theirs."""

    step: str
    flags: dict[str, str] = field(default_factory=dict)
    notes: list[tuple[str, str]] = field(default_factory=list)
    """Kept, renamed, and so on; and the text."""

    def spelt(self, name: str) -> list[str]:
        """A flag of ours as this step spells it: one, or one for each model of step 3."""
        known = flags_of(self.step)
        names = [name] if name in known else [f"{side}_{name}" for side in ("actor", "critic")]
        return [name for name in names if name in known]

    def give(self, values: dict[str, str]) -> list[str]:
        """Set flags of ours; the names that this step has of them."""
        names = []
        for name, value in values.items():
            for spelt in self.spelt(name):
                self.flags[spelt] = value
                names.append(spelt)
        return names

    def note(self, kind: str, text: str) -> None:
        """Say something of a flag."""
        self.notes.append((kind, text))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = ReadableParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE", help="The file of the other project.")
    parser.add_argument(
        "--step", choices=tuple(COMMANDS), help="What it trains, where the file does not tell."
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Print the script. Raises `UserError` for a file that cannot be read."""
    source = read(args.file)
    step = COMMANDS[args.step] if args.step else source.step
    if step is None:
        raise UserError(f"{args.file} does not tell what it trains; say it with --step {'|'.join(COMMANDS)}.")
    print(script(source, translate(source, step), args.file.name))


def translate(source: Source, step: str) -> Translation:
    """Every setting of the source in our terms."""
    done = Translation(step)
    for name, value in source.settings.items():
        _translate_one(done, name, value)
    if source.project != "DeepSpeed-Chat":
        _complete_adapters(done, source.project)
        _complete_ppo(done, source.settings)
    for flag, theirs in DEFAULTS.get((source.project, step), {}).items():
        for spelt in done.spelt(flag):
            if spelt not in done.flags:
                done.note("another default", f"--{spelt} is {theirs} there")
    problem = _problem(done)
    if problem:
        done.note("to mend", problem)
    return done


def _translate_one(done: Translation, name: str, value: str) -> None:
    if done.step == "rlhf" and name in (*ACTOR, *REWARD_MODEL):
        side = "actor" if name in ACTOR else "critic"
        done.give({f"{side}_model_name_or_path": value})
        done.note("renamed", f"--{name}: --{side}_model_name_or_path")
    elif done.step == "rlhf" and name in LENGTHS:
        done.note("see", f"--{name} {value}: prompt and answer have --max_prompt_seq_len and --{ANSWERS}")
    elif name in RULES:
        flags, text = RULES[name](re.sub(r"""^(['"])([^'"$]*)\1$""", r"\2", value))  # one word without quotes
        names = done.give(flags)
        to = " ".join(f"--{spelt} {done.flags[spelt]}" for spelt in names)
        kind = ("kept" if names == [name] else "renamed") if names else "left out"
        done.note(kind, ": ".join(filter(None, (f"--{name} {value}".strip(), to, text))))
    elif name in flags_of(done.step):
        done.give({name: value})
        done.note("kept", f"--{name}")
    else:
        _explain(done, name, value)


def _explain(done: Translation, name: str, value: str) -> None:
    """A flag of another name, by what messages say of it."""
    told = explain_foreign_flag(name, flags_of(done.step))
    if told is None:
        done.note("unknown", f"--{name} {value}".strip())
    elif match := RENAMED.fullmatch(told):
        done.give({flag.removeprefix("--"): value for flag in match[1].split(" and ")})
        done.note("renamed", f"--{name}: {told.removeprefix('here: ')}")
    elif match := FIXED.fullmatch(told):
        if is_true(value):
            done.give({match[1]: match[2]})
        done.note("renamed", f"--{name}: {told.removeprefix('here: ')}")
    else:
        kind = "not there" if told.startswith("not there") else "see"
        done.note(kind, f"--{name} {value}: {re.sub('^(not there: |here: )', '', told)}")


def _complete_adapters(done: Translation, project: str) -> None:
    """PEFT trains adapters alone, at the one learning rate; here they have a rate of their own."""
    dims = [name for name in done.flags if name.endswith("lora_dim")]
    if done.flags.get("only_optimize_lora") and not dims:
        dims = done.give({"lora_dim": "8"})
        done.note("another default", "--lora_dim is 8 there")
    if not dims:
        return
    done.give({"only_optimize_lora": "true"})
    done.note("added", "--only_optimize_lora: adapters alone are trained, as there")
    for dim in dims:
        side, size = dim.removesuffix("lora_dim"), done.flags[dim]
        if rate := done.flags.get(f"{side}learning_rate"):
            done.flags[f"{side}lora_learning_rate"] = rate
            done.note("added", f"--{side}lora_learning_rate: adapters have a learning rate of their own")
        if project == "LLaMA-Factory" and f"{side}lora_alpha" not in done.flags and size.isdecimal():
            done.flags[f"{side}lora_alpha"] = str(2 * int(size))
            done.note("another default", f"--{side}lora_alpha is twice --{dim} there")


def _complete_ppo(done: Translation, settings: dict[str, str]) -> None:
    """What follows for step 3 from several settings together."""
    if done.step != "rlhf":
        return
    batch = done.flags.get("per_device_training_batch_size")
    if batch:
        steps = done.flags.get("gradient_accumulation_steps", "1")
        done.give({"per_device_generation_batch_size": batch, "generation_batches": steps})
        done.note("added", "as many answers are sampled as an optimiser step takes, as there")
    whole = next((settings[name] for name in LENGTHS if settings.get(name, "").isdecimal()), None)
    answer = done.flags.get(ANSWERS, "")
    if whole and answer.isdecimal() and int(whole) > int(answer):
        done.give({"max_prompt_seq_len": str(int(whole) - int(answer))})
        done.note("added", f"--max_prompt_seq_len is what --{ANSWERS} leaves of {whole}")


def _problem(done: Translation) -> str:
    """What our parser says of the flags; nothing where they are good, or depend on variables of the shell."""
    words = []
    for name, value in done.flags.items():
        if "$" in value or "<" in value:
            return ""
        words += [f"--{name}", *shlex.split(value)]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # its notes are of no script
            parse_arguments(done.step, words)
    except UserError as error:
        return str(error)
    return ""


def script(source: Source, done: Translation, name: str) -> str:
    """The shell script: notes as comments, and the command."""
    command = next(command for command, step in COMMANDS.items() if step == done.step)
    lines = [f"# {name}, of {source.project}, as dschat {command}", "#"]
    width = max((len(kind) for kind, _ in done.notes), default=0)
    lines += [f"# {kind:{width}}  {' '.join(text.split())}" for kind, text in done.notes]
    words = [f"--{flag} {value}".strip() for flag, value in done.flags.items()]
    call = " \\\n    ".join([" ".join([*_launcher(source.launcher), command]), *words])
    before = re.sub(r"^#!.*\n?", "", source.before)
    parts = ["#!/bin/bash", *lines, before.strip("\n"), f"{call} {source.after}".rstrip()]
    return "\n".join(part for part in parts if part)


def _launcher(words: list[str]) -> list[str]:
    """The launcher of ours for theirs: deepspeed and torchrun stay, others become torchrun or nothing."""
    variables = [word for word in words if re.match(r"[A-Za-z_]\w*=", word)]
    rest = words[len(variables) :]
    ranks = next((word.partition("=")[2] for word in variables if word.startswith("NPROC_PER_NODE=")), None)
    for flag in ("--num_processes", "--nproc_per_node", "--nproc-per-node"):
        for place, word in enumerate(rest):
            if word.partition("=")[0] == flag:
                ranks = word.partition("=")[2] or rest[place + 1]
    started = [word for word in variables if not word.startswith("NPROC_PER_NODE=")]
    if rest[:1] == ["deepspeed"]:
        return [*started, *rest, "--module", "dschat"]
    if rest[:1] == ["torchrun"]:
        return [*started, *rest, "-m", "dschat"]
    if ranks:
        return [*started, "torchrun", "--nproc_per_node", ranks, "-m", "dschat"]
    return [*started, "dschat"]


if __name__ == "__main__":
    with readable_errors():
        main(parse())
