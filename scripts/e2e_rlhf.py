"""The three steps in a row: supervised fine-tuning, reward model, PPO.

    python scripts/e2e_rlhf.py --actor-model facebook/opt-1.3b --reward-model facebook/opt-350m \\
        --actor-zero-stage 2 --reward-zero-stage 0 --deployment-type single_node --output-dir output

Each step writes OUTPUT/step1_sft, OUTPUT/step2_reward or OUTPUT/step3_ppo, its console in training.log there.
Step 3 trains what step 1 wrote against what step 2 wrote. Flags of a step's own go in one quoted string:

    --sft-args "--num_train_epochs 2 --learning_rate 1e-5"

The same command again leaves out the steps that have finished. Where steps make checkpoints, as they do with
--common-args "--save_interval 100", it goes on in the middle of an interrupted one if --resume is added.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.arguments import ReadableParser, RlhfArguments
from dschat.console.text import PLAIN
from dschat.data.entries import parse_entry
from dschat.data.files import is_local, user_path
from dschat.distributed.rendezvous import free_port
from dschat.errors import EXIT_TRY_AGAIN, UserError
from dschat.program import readable_errors
from dschat.runs.last_lines import achieved, print_next
from dschat.runs.output_folder import read_summary
from scripts.e2e_failures import failure
from scripts.e2e_finished import differences
from scripts.e2e_reports import compare_actors, report_on
from scripts.e2e_step import EXIT_BAD_INPUT, FOLDERS, PARSER_NAMES, TITLES, Command, run

TO_KNOW = (
    *("actor-model", "reward-model", "data-path", "output-dir", "deployment-type", "common-args"),
    *("sft-args", "reward-args", "ppo-args", "resume"),
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = ReadableParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.to_know = TO_KNOW
    add = parser.add_argument
    add(
        "--step",
        type=int,
        nargs="+",
        choices=(1, 2, 3),
        default=[1, 2, 3],
        help="Steps to run (default 1 2 3).",
    )
    add("--actor-model", default="facebook/opt-1.3b", help="Folder or hub id that step 1 fine-tunes.")
    add(
        "--reward-model",
        default="facebook/opt-350m",
        help="Folder or hub id that step 2 makes a reward model of; 'sft' takes what step 1 writes.",
    )
    for name, models in (("actor", "step 1 and of the actor"), ("reward", "step 2 and of the critic")):
        help = f"ZeRO stage of {models}."
        add(f"--{name}-zero-stage", type=int, choices=range(4), default=0, help=help)
    add("--output-dir", type=Path, default=Path("output"), help="Folder of all three steps (default output).")
    add("--data-path", nargs="+", default=["Dahoas/rm-static"], help="Data sets, the same for every step.")
    add(
        "--deployment-type",
        choices=("single_gpu", "single_node", "multi_node"),
        default="single_gpu",
        help="One process, the processes of one node, or the nodes of --hostfile.",
    )
    add(
        "--num-gpus", type=int, help="Processes on a node (without GPUs, CPU processes); default: a GPU each."
    )
    add("--hostfile", type=Path, help="multi_node: lines such as 'worker-1 slots=8' (default /job/hostfile).")
    add(
        "--common-args",
        default="",
        metavar="FLAGS",
        help="Flags of all steps, as one string, such as '--dtype fp32'.",
    )
    add("--sft-args", default="", metavar="FLAGS", help="More flags of step 1, as one string.")
    add("--reward-args", default="", metavar="FLAGS", help="More flags of step 2, as one string.")
    add("--ppo-args", default="", metavar="FLAGS", help="More flags of step 3, as one string.")
    add(
        "--forecast",
        metavar="FLAGS",
        help="Flags of dschat forecast, as one string, such as '--gold_function check.py:right': step 3 "
        "begins with a forecast, and ends there where its reward model is not worth PPO.",
    )
    add("--force", action="store_true", help="Step 3 trains whatever the forecast says.")
    add(
        "--skip-finished",
        action="store_true",
        help="Leave out steps that have finished also where they were made otherwise than this command says.",
    )
    add(
        "--compare-prompts",
        type=int,
        default=64,
        help="Held-out prompts on which SFT and PPO are compared at the end (default 64); 0: none.",
    )
    add("--resume", action="store_true", help="An interrupted step goes on from its newest checkpoint.")
    add(
        "--overwrite-output-dir",
        "--overwrite_output_dir",
        action="store_true",
        help="Run the steps anew, also those that have finished, and remove what they wrote.",
    )
    return checked(parser.parse_args(argv))


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """The flags with their paths and steps in order. Raises `UserError` for what cannot work."""
    args.step = sorted(set(args.step))
    try:
        args.output_dir = args.output_dir.expanduser().resolve()
    except (OSError, RuntimeError) as error:  # the second: ~name of nobody
        raise UserError(f"--output-dir {args.output_dir} is no path ({error}); give another.") from error
    if args.compare_prompts < 0:
        raise UserError(f"--compare-prompts must be at least 0, got {args.compare_prompts}; 0 is none.")
    if args.num_gpus is not None and args.num_gpus < 1:
        raise UserError(f"--num-gpus must be at least 1, got {args.num_gpus}; without it there is one a GPU.")
    if args.reward_model == "sft":
        args.reward_model = str(args.output_dir / FOLDERS[1])
    return args


def words(flag: str, text: str) -> list[str]:
    """The words of a quoted flag string. Raises `UserError` where quotes do not match."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{flag} {text!r} cannot be split into flags ({error}).") from error


def step_flags(args: argparse.Namespace, step: int) -> list[str]:
    """The flags of a step's main.py; those that the user adds come last and win."""
    out = args.output_dir
    actor_stage, reward_stage = str(args.actor_zero_stage), str(args.reward_zero_stage)
    own = {
        1: ["--model_name_or_path", args.actor_model, "--zero_stage", actor_stage],
        2: ["--model_name_or_path", args.reward_model, "--zero_stage", reward_stage],
        3: ["--actor_model_name_or_path", str(out / FOLDERS[1]),
            "--critic_model_name_or_path", str(out / FOLDERS[2]),
            "--actor_zero_stage", actor_stage, "--critic_zero_stage", reward_stage],
    }[step]  # fmt: skip
    name = {1: "sft", 2: "reward", 3: "ppo"}[step]
    extra = words(f"--{name}-args", getattr(args, f"{name}_args"))
    common = words("--common-args", args.common_args)
    start = ["--resume_from_checkpoint", "latest"] if args.resume else []
    start += ["--overwrite_output_dir"] if args.overwrite_output_dir else []
    if step == 3:
        start += [*(["--forecast", args.forecast] if args.forecast else []), *["--force"] * args.force]
    paths = ["--data_path", *args.data_path, "--output_dir", str(out / FOLDERS[step])]
    return [*paths, *own, *start, *common, *extra]


def launcher(args: argparse.Namespace) -> list[str]:
    """What starts a step's main.py: this Python, or DeepSpeed's launcher of this environment."""
    if args.deployment_type == "single_gpu":
        return [sys.executable]
    number = ["--num_gpus", str(args.num_gpus)] if args.num_gpus else []
    if args.deployment_type == "multi_node":
        hosts = ["--hostfile", str(args.hostfile)] if args.hostfile else []
        return [sys.executable, str(ROOT / "scripts/launch.py"), *number, *hosts]
    # A free port, so that two runs on a machine do not meet; and no hostfile that happens to lie about.
    start = [sys.executable, "-m", "deepspeed.launcher.runner", *number]
    return [*start, "--hostfile", os.devnull, "--master_port", str(free_port())]


def commands(args: argparse.Namespace) -> list[Command]:
    """What will run."""
    result = []
    for step in args.step:
        flags = step_flags(args, step)
        argv = [*launcher(args), str(ROOT / FOLDERS[step] / "main.py"), *flags]
        result.append(Command(step, argv, flags, args.output_dir / FOLDERS[step]))
    return result


def check(args: argparse.Namespace, todo: list[Command]) -> None:
    """Find what cannot work before anything starts. Raises `UserError`.

    The steps' own checks of their flags; what the flags name the first step reads in its first seconds.
    """
    if args.deployment_type == "single_gpu" and (args.num_gpus or 1) > 1:
        raise UserError(f"--num-gpus {args.num_gpus} needs --deployment-type single_node or multi_node.")
    if args.deployment_type == "multi_node" and not (args.hostfile or Path("/job/hostfile")).is_file():
        raise UserError(
            "--deployment-type multi_node needs --hostfile, a file of lines such as 'worker-1 slots=8'."
        )
    for command in todo:
        parsed = command.parsed
        if isinstance(parsed, RlhfArguments) and parsed.forecast.words:
            _check_forecast([*parsed.forecast.words, *command.flags])
    for entry in args.data_path:
        if user_path(parse_entry(entry, "--data-path").name).is_fifo():
            raise UserError(
                f"--data-path {entry} is a pipe, which every step would read; write it to a file."
            )
    produced = {str(command.folder) for command in todo}
    for step, flag, model in (
        (1, "--actor-model", args.actor_model),
        (2, "--reward-model", args.reward_model),
    ):
        if any(command.step == step for command in todo) and model not in produced:
            _check_model(flag, model)
    if any(command.step == 3 for command in todo):
        for step in (1, 2):
            folder = args.output_dir / FOLDERS[step]
            if str(folder) not in produced and not (folder / "config.json").is_file():
                raise UserError(f"step 3 needs the model of step {step} in {folder}; add {step} to --step.")


def _check_forecast(flags: list[str]) -> None:
    from scripts import forecast

    try:
        forecast.parse(flags)
    except UserError as error:
        raise UserError(f"--forecast: {error}") from error


def _check_model(flag: str, name: str) -> None:
    """Raise `UserError` for what is no folder and cannot be a hub id: step 2 would find it after step 1."""
    if is_local(name):
        return
    from huggingface_hub.utils import HFValidationError, validate_repo_id  # half of the time to --help

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{flag} {name} does not exist; give a path that does, or a hub id.") from error


def unfinished(args: argparse.Namespace, steps: list[Command]) -> list[Command]:
    """The steps to be run: those that have not finished, and those to be run anew; what is left out is said.

    Raises `UserError` where one finished otherwise than the command says.
    """
    todo: list[Command] = []
    for command in steps:
        arguments = command.parsed
        if read_summary(command.folder) is None or arguments.run.overwrite_output_dir:
            todo.append(command)
            continue
        others = differences(arguments, command.folder)
        others += [f"step {c.step} runs before it" for c in todo if str(c.folder) in command.flags]
        if others and not args.skip_finished:
            raise UserError(
                f"{command.title} has finished in {command.folder}, but otherwise than this command says: "
                f"{'; '.join(others)}. Name another --output-dir; or give --overwrite-output-dir to run it "
                "anew (--step says which), or --skip-finished to leave it as it is."
            )
        but = f", otherwise than this command says ({'; '.join(others)})" if others else ""
        print(f"== step {command.step} has finished before{but}: skipped", flush=True)
    return todo


def print_table(output_dir: Path, steps: Sequence[int]) -> None:
    """What each step achieved."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="what each step achieved")
    for heading in ("step", "figures", "seconds", "folder"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left", overflow="fold")
    for step in steps:
        summary = read_summary(output_dir / FOLDERS[step])
        if summary is None:
            continue
        seconds = summary.get("seconds")
        elapsed = f"{seconds:.0f}" if isinstance(seconds, int | float) else "-"
        table.add_row(f"{step} {TITLES[step]}", achieved(PARSER_NAMES[step], summary), elapsed, FOLDERS[step])
    Console(**PLAIN).print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps; returns the exit code."""
    args = parse(argv)
    steps = commands(args)
    check(args, steps)
    for command in unfinished(args, steps):
        print(f"== step {command.step}, {TITLES[command.step]}: {command.folder}", flush=True)
        code, is_stop, start = run(command)
        if is_stop:
            print("the same command with --resume goes on.", file=sys.stderr, flush=True)
            return EXIT_TRY_AGAIN
        if code == EXIT_BAD_INPUT and not command.is_launched:
            said = f"error: {command.title} ended with the message above; its log is {command.log}."
            print(f"{said} Once that is mended, the same command goes on.", file=sys.stderr, flush=True)
            return EXIT_BAD_INPUT
        if code != 0 or read_summary(command.folder) is None:
            report_on(args.output_dir)
            print("\n" + failure(command.title, code, command.log, start=start), file=sys.stderr, flush=True)
            return 1
    print_table(args.output_dir, args.step)
    if 3 in args.step and args.compare_prompts:
        compare_actors(args.output_dir, args.compare_prompts)
    report_on(args.output_dir)
    print_next(steps[-1].parsed.description)
    return 0


if __name__ == "__main__":
    with readable_errors():
        sys.exit(main())
