"""The command `dschat`: every program of the project by a short name.

dschat sft --model_name_or_path MODEL ...      python -m dschat sft ...
torchrun --nproc_per_node 2 -m dschat sft ...  deepspeed --num_gpus 2 --module dschat sft ...
"""

import argparse
import difflib
import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dschat.arguments import ReadableParser, complete
from dschat.errors import UserError
from dschat.program import readable_errors
from dschat.runs.started import installed_versions

PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Program:
    """A file of the tree that a command starts."""

    file: str
    """Its path in the tree."""
    purpose: str
    completes: bool = True
    """Whether it reads its flags with a parser that completes the words of a shell."""


PIPELINE = {
    "sft": Program("step1_sft/main.py", "step 1: fine-tune a causal language model"),
    "reward": Program("step2_reward/main.py", "step 2: train a reward model on preference pairs"),
    "ppo": Program("step3_ppo/main.py", "step 3: PPO against the reward model, a function or a server"),
    "dpo": Program("step2_reward/dpo.py", "DPO on the pairs, in place of steps 2 and 3"),
    "e2e": Program("scripts/e2e_rlhf.py", "the three steps in a row"),
}
TOOLS = {
    "demo": Program("scripts/demo.sh", "the three steps on a small task and a model made on the spot", False),
    "doctor": Program("scripts/doctor.py", "what is wrong with this machine, and what mends it"),
    "plan": Program("scripts/plan.py", "what a run will take of memory, time and money"),
    "check-cluster": Program("scripts/check_cluster.py", "what keeps several hosts from training together"),
    "inspect": Program(
        "scripts/inspect_data.py", "what a model will see of the data, and what is wrong there"
    ),
    "chat": Program("scripts/chat.py", "talk to a model"),
    "serve": Program("scripts/serve.py", "a model for OpenAI's clients and a browser, or two with votes"),
    "compare": Program("scripts/compare.py", "answers of several models side by side"),
    "forecast": Program("scripts/forecast.py", "whether a reward model is worth PPO, before PPO"),
    "replay": Program(
        "scripts/replay.py", "a PPO step again, bit by bit, token by token, or as it would have been"
    ),
    "reward-report": Program("scripts/reward_report.py", "whether a reward model can be trusted"),
    "report": Program("scripts/report.py", "what a run did, as one page"),
    "convert": Program(
        "scripts/convert_checkpoint.py", "DeepSpeed-Chat's folders to ours and back, TRL's to ours"
    ),
    "migrate": Program("scripts/migrate.py", "a launch script of another project as a command of ours"),
    "merge-adapter": Program("scripts/merge_adapter.py", "an adapter and its base to a whole model"),
    "launch": Program("scripts/launch.py", "deepspeed's launcher, safe for the shells of other hosts", False),
}
COMMANDS = PIPELINE | TOOLS


def main() -> NoReturn:
    """Start the program that the first word names; its exit code is the command's."""
    words = sys.argv[1:]
    if words and words[0].startswith("--local_rank"):  # deepspeed's launcher sets LOCAL_RANK as well
        words = words[1:]
    if "_ARGCOMPLETE" in os.environ:
        words = [word_to_complete()]
    with readable_errors():
        program = chosen(words[0] if words else "--help")
    ReadableParser.command = f"dschat {words[0]}"
    ReadableParser.commands = {program.file: name for name, program in COMMANDS.items()}
    start(programs_root() / program.file, words[1:])


def chosen(name: str) -> Program:
    """The program of a command; --help and --version print and end. Raises `UserError` for another word."""
    if name in ("-h", "--help", "help"):
        print(overview())
        sys.exit()
    if name == "--version":
        installed = installed_versions(["dschat"])
        print(f"dschat {installed['dschat']}" if installed else "dschat, a checkout that is not installed")
        sys.exit()
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"dschat has no command {name!r}{meant}; dschat --help lists them.")
    return COMMANDS[name]


def word_to_complete() -> str:
    """The command whose flags a shell asks argcomplete for. Answers and ends where it asks for the command.

    Ends without an answer where no program would give one.
    """
    words = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])].split(" ")
    before = int(os.environ["_ARGCOMPLETE"])
    if len(words) == before + 1:
        parser = argparse.ArgumentParser(add_help=False)
        parser.add_argument("command", choices=COMMANDS)
        complete(parser)
    os.environ["_ARGCOMPLETE"] = str(before + 1)
    if words[before] not in COMMANDS or not COMMANDS[words[before]].completes:
        sys.exit()
    return words[before]


def overview() -> str:
    """The steps in their order, and every command."""
    width = max(map(len, COMMANDS))
    sections = (("Steps", PIPELINE), ("Tools", TOOLS))
    lines = [
        "preferences + pretrained model -> dschat sft -> dschat reward -> dschat ppo -> actor/",
        "                                           `-> dschat dpo, without a reward model",
    ]
    for title, programs in sections:
        lines += ["", f"{title}:", *(f"  {name:{width}}  {p.purpose}" for name, p in programs.items())]
    return "\n".join([*lines, "", "dschat COMMAND --help lists the flags of a command."])


def programs_root() -> Path:
    """The folder of `step1_sft/` and its siblings: the checkout, or the copy in an installed wheel."""
    checkout = PACKAGE.parent
    return checkout if (checkout / "step1_sft" / "main.py").is_file() else PACKAGE / "tree"


def start(file: Path, arguments: list[str]) -> NoReturn:
    """Run a program of the tree as `python FILE` would, in this process, or a recipe with bash."""
    if file.suffix == ".sh":
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        os.execvpe("bash", ["bash", str(file), *arguments], {**os.environ, "PATH": path})
    sys.argv = [str(file), *arguments]
    runpy.run_path(str(file), run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    main()
