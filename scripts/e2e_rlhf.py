"""The three steps in a row: supervised fine-tuning, reward model, PPO.

    python scripts/e2e_rlhf.py --actor-model facebook/opt-1.3b --reward-model facebook/opt-350m \\
        --actor-zero-stage 2 --reward-zero-stage 0 --deployment-type single_node --output-dir output

Each step writes OUTPUT/step1_sft, OUTPUT/step2_reward or OUTPUT/step3_ppo, its console in training.log there.
Step 3 trains what step 1 wrote against what step 2 wrote. Flags of a step's own go in one quoted string:

    --sft-args "--num_train_epochs 2 --learning_rate 1e-5"

With --common-args "--save_interval 100" the same command and --resume goes on where a run was interrupted.
"""

import argparse
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.command_line import ReadableParser
from dschat.console import PLAIN
from dschat.errors import EXIT_TRY_AGAIN, UserError, readable_errors
from dschat.run_folder import SUMMARY, read_summary

FOLDERS = {1: "step1_sft", 2: "step2_reward", 3: "step3_ppo"}
TITLES = {1: "supervised fine-tuning", 2: "reward model", 3: "PPO"}
PARSER_NAMES = {1: "sft", 2: "reward", 3: "rlhf"}
SHOWN_LINES = 20
LOG = "training.log"

# What a log says, and what usually helps; the first that matches the end of the log is shown.
REMEDIES = (
    (
        r"out of memory|OutOfMemoryError|DefaultCPUAllocator: can't allocate|MemoryError",
        "Memory ran out. Smaller --per_device_*_batch_size with more --gradient_accumulation_steps, a higher "
        "ZeRO stage (--actor-zero-stage 3), --gradient_checkpointing (step 3: --actor_gradient_checkpointing "
        "--critic_gradient_checkpointing) or --offload lower what is needed.",
    ),
    (
        r"EADDRINUSE|Address already in use",
        "The port of the process group is taken: another run is using it. Wait for that run or end it.",
    ),
    (
        r"No space left on device",
        "The disk is full. Free some space, or give another --output-dir (token cache: --data_output_path).",
    ),
    (
        r"Permission denied",
        "A file or folder may not be written or read: the line above names it. Give another --output-dir, or "
        "--data_output_path for the token cache.",
    ),
    (
        r"NCCL error|ncclSystemError|ncclUnhandledCudaError|ncclInternalError",
        "The GPUs could not talk to each other. NCCL_DEBUG=INFO tells more; on several nodes "
        "NCCL_SOCKET_IFNAME must name the network interface that connects them.",
    ),
    (
        r"Error building extension|ninja: (error|build stopped)|c\+\+: not found|CUDA_HOME",
        "DeepSpeed could not compile one of its operators. It needs g++ and ninja (and on GPUs a CUDA "
        "toolkit of torch's version); leaving out --offload avoids its Adam for the CPU.",
    ),
    (
        r"offline mode|Max retries exceeded|ConnectionError|couldn't connect to|Name or service not known",
        "The hub could not be reached. Download the model or the data beforehand and give the folder's path.",
    ),
    (
        r"No such file or directory|FileNotFoundError|does not exist",
        "A file is missing: the line above names it. Check the path.",
    ),
    (r"ModuleNotFoundError|ImportError", "A package is missing or does not fit: run bash scripts/setup.sh."),
    (
        r"exits with return code = -9|Killed",
        "A process was killed, most often because memory ran out: try a smaller batch, a higher ZeRO stage.",
    ),
    (r"(^|\n)(\[rank\d+\]: )?error: ", "The message above says what to change."),
)


@dataclass(frozen=True)
class Command:
    """What runs for one step, and where its output lies."""

    step: int
    argv: list[str]
    flags: list[str]
    folder: Path


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = ReadableParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
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
    add(
        "--actor-zero-stage",
        type=int,
        choices=range(4),
        default=0,
        help="ZeRO stage of step 1 and of the actor.",
    )
    add(
        "--reward-zero-stage",
        type=int,
        choices=range(4),
        default=0,
        help="ZeRO stage of step 2 and of the critic.",
    )
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
    add("--skip-finished", action="store_true", help="Leave out steps whose summary.json is there.")
    add(
        "--resume",
        action="store_true",
        help="--skip-finished, and the step that was interrupted goes on from its newest checkpoint.",
    )
    args = parser.parse_args(argv)
    args.step = sorted(set(args.step))
    args.skip_finished |= args.resume
    try:
        args.output_dir = args.output_dir.expanduser().resolve()
    except (OSError, RuntimeError) as error:  # the second: ~name of nobody
        raise UserError(f"--output-dir {args.output_dir} is no path ({error}); give another.") from error
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
    resume = ["--resume_from_checkpoint", "latest"] if args.resume else []
    paths = ["--data_path", *args.data_path, "--output_dir", str(out / FOLDERS[step])]
    return [*paths, *own, *resume, *common, *extra]


def launcher(args: argparse.Namespace) -> list[str]:
    """What starts a step's main.py: this Python, or DeepSpeed's launcher of this environment."""
    if args.deployment_type == "single_gpu":
        return [sys.executable]
    start = [sys.executable, "-m", "deepspeed.launcher.runner"]
    if args.num_gpus:
        start += ["--num_gpus", str(args.num_gpus)]
    if args.deployment_type == "multi_node":
        return start + (["--hostfile", str(args.hostfile)] if args.hostfile else [])
    # A free port, so that two runs on a machine do not meet; and no hostfile that happens to lie about.
    return [*start, "--hostfile", os.devnull, "--master_port", str(_free_port())]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def commands(args: argparse.Namespace) -> list[Command]:
    """What will run."""
    result = []
    for step in args.step:
        flags = step_flags(args, step)
        argv = [*launcher(args), str(ROOT / FOLDERS[step] / "main.py"), *flags]
        result.append(Command(step, argv, flags, args.output_dir / FOLDERS[step]))
    return result


def check(args: argparse.Namespace, todo: list[Command]) -> None:
    """Find what cannot work before anything starts. Raises `UserError`."""
    from dschat.arguments import parse_arguments

    if args.num_gpus is not None and args.num_gpus < 1:
        raise UserError(f"--num-gpus must be at least 1, got {args.num_gpus}.")
    if args.deployment_type == "single_gpu" and (args.num_gpus or 1) > 1:
        raise UserError(f"--num-gpus {args.num_gpus} needs --deployment-type single_node or multi_node.")
    if args.deployment_type == "multi_node" and not (args.hostfile or Path("/job/hostfile")).is_file():
        raise UserError(
            "--deployment-type multi_node needs --hostfile, a file of lines such as 'worker-1 slots=8'."
        )
    for command in todo:
        try:
            parse_arguments(PARSER_NAMES[command.step], command.flags)
        except UserError as error:
            raise UserError(f"flags of step {command.step}: {error}") from error
    for entry in args.data_path:
        _check_path("--data-path", entry)
    produced = {str(command.folder) for command in todo}
    for step, flag, model in (
        (1, "--actor-model", args.actor_model),
        (2, "--reward-model", args.reward_model),
    ):
        if any(command.step == step for command in todo) and model not in produced:
            _check_path(flag, model)
    if any(command.step == 3 for command in todo):
        for step in (1, 2):
            folder = args.output_dir / FOLDERS[step]
            if str(folder) not in produced and not (folder / "config.json").is_file():
                raise UserError(f"step 3 needs the model of step {step} in {folder}; add {step} to --step.")


def _check_path(flag: str, value: str) -> None:
    looks_local = value.startswith((".", "/", "~")) or value.count("/") > 1
    looks_local |= value.endswith((".json", ".jsonl", ".parquet", ".gz"))
    if looks_local and not Path(value).expanduser().exists():
        raise UserError(f"{flag} {value} does not exist; give a path that does, or a hub id.")


def run(command: Command) -> int:
    """Run a step, its output on the console and in its log; returns the exit code."""
    from dschat.arguments import without_secrets

    command.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (command.folder / SUMMARY).unlink(missing_ok=True)
    # DeepSpeed finds ninja, which belongs to this environment, through PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1"}
    with (command.folder / LOG).open("ab" if "--resume_from_checkpoint" in command.flags else "wb") as log:
        log.write((without_secrets(shlex.join(command.argv)) + "\n").encode())
        log.flush()
        process = subprocess.Popen(
            command.argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
        with passing_signals_on(process), process.stdout:
            # Whatever has arrived, not whole lines: progress bars rewrite theirs.
            while chunk := os.read(process.stdout.fileno(), 65536):
                log.write(chunk)
                log.flush()
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
            return process.wait()


@contextmanager
def passing_signals_on(process: subprocess.Popen) -> Iterator[None]:
    """Inside, a request to stop goes to the step, which ends in its own time; a failure here ends it, too."""
    before = {
        number: signal.signal(number, lambda number, _: process.send_signal(number))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    }
    try:
        yield
    except BaseException:
        process.terminate()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def was_stopped(command: Command, code: int) -> bool:
    """Whether a step obeyed a request to stop; launchers have exit codes of their own."""
    asked = r"^stopped after step \d+ as \w+ asked"
    return code == EXIT_TRY_AGAIN or any(
        re.match(asked, line) for line in last_lines(command.folder / LOG, 200)
    )


def last_lines(log: Path, count: int = SHOWN_LINES) -> list[str]:
    """The end of a log as it stood on the console: of a progress bar, only its last state."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 65536))
        text = file.read().decode(errors="replace")
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [line for line in lines if line][-count:]


def remedy(lines: Sequence[str]) -> str:
    """What usually helps against what these lines of a log say."""
    text = "\n".join(lines)
    for pattern, advice in REMEDIES:
        if re.search(pattern, text):
            return advice
    return "No known cause was recognised; the log has the whole story."


def report_failure(command: Command, code: int) -> None:
    """Name the step that failed, its log, its last lines and the likely remedy."""
    log = command.folder / LOG
    lines = last_lines(log)
    # The end of a failed launch is the launcher's own noise: causes are looked for further up.
    advice = remedy(last_lines(log, 200))
    message = [
        "",
        f"error: step {command.step} ({TITLES[command.step]}) failed with exit code {code}.",
        f"log: {log}",
        *(f"  | {line}" for line in lines),
        f"likely remedy: {advice}",
        "Finished steps need not run again: add --resume.",
    ]
    print("\n".join(message), file=sys.stderr, flush=True)


def achieved(step: int, summary: dict[str, Any]) -> str:
    """The figures of a finished step in one phrase."""

    def number(name: str, digits: int = 3) -> str:
        value = summary.get(name)
        return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"

    if step == 1:
        before, after = number("initial_eval_perplexity"), number("eval_perplexity")
        return f"perplexity {before} -> {after} on held-out answers"
    if step == 2:
        return f"accuracy {number('eval_accuracy')} ± {number('eval_accuracy_stderr')} on held-out pairs"
    return f"last of {summary.get('ppo_steps', '-')} PPO steps: score {number('score')}, KL {number('kl')}"


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
        table.add_row(f"{step} {TITLES[step]}", achieved(step, summary), elapsed, FOLDERS[step])
    Console(**PLAIN).print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps; returns the exit code."""
    args = parse(argv)
    todo = commands(args)
    if args.skip_finished:
        for command in [command for command in todo if read_summary(command.folder)]:
            print(f"== step {command.step} has finished before: skipped", flush=True)
            todo.remove(command)
    check(args, todo)
    for command in todo:
        print(f"== step {command.step}, {TITLES[command.step]}: {command.folder}", flush=True)
        code = run(command)
        if read_summary(command.folder) is None and was_stopped(command, code):
            print("the same command with --resume goes on.", file=sys.stderr, flush=True)
            return EXIT_TRY_AGAIN
        if code != 0 or read_summary(command.folder) is None:
            report_failure(command, code)
            return 1
    print_table(args.output_dir, args.step)
    return 0


if __name__ == "__main__":
    with readable_errors():
        sys.exit(main())
