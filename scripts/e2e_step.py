"""One of the three steps of e2e_rlhf.py: its command line, and how it is run."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Literal, cast

from dschat.arguments import StepArguments, parse_arguments, without_secrets
from dschat.distributed.signals import STOPPING
from dschat.errors import EXIT_TRY_AGAIN, UserError
from dschat.runs.last_lines import UNASKED
from scripts.e2e_failures import SEARCHED_LINES, last_lines

FOLDERS = {1: "step1_sft", 2: "step2_reward", 3: "step3_ppo"}
TITLES = {1: "supervised fine-tuning", 2: "reward model", 3: "PPO"}
PARSER_NAMES: dict[int, Literal["sft", "reward", "rlhf"]] = {1: "sft", 2: "reward", 3: "rlhf"}
LOG = "training.log"

STOPPED = r"^(\S+: )?stopped after step \d+ as .+ asked"
"""What a step says that was asked to stop; several nodes have their names in front."""

EXIT_BAD_INPUT = 2
"""Of a step that ended with a message about its input: no further start would help."""


@dataclass(frozen=True)
class Command:
    """What runs for one step, and where its output lies."""

    step: int
    argv: list[str]
    flags: list[str]
    folder: Path

    @property
    def title(self) -> str:
        """The step's number and name."""
        return f"step {self.step} ({TITLES[self.step]})"

    @property
    def is_launched(self) -> bool:
        """Whether a launcher starts the program, rather than this Python."""
        return len(self.argv) > 2 + len(self.flags)

    @property
    def log(self) -> Path:
        """Where its console goes, after that of earlier runs."""
        return self.folder / LOG

    @cached_property  # what is said of flags is said once
    def parsed(self) -> StepArguments:
        """Its flags as the step itself understands and checks them. Raises `UserError`."""
        try:
            return cast(StepArguments, parse_arguments(PARSER_NAMES[self.step], self.flags))
        except UserError as error:
            raise UserError(f"flags of step {self.step}: {error}") from error


def run(command: Command) -> tuple[int, bool, int]:
    """Run a step, its output on the console and in its log.

    Returns the exit code, whether that is a stop which was asked for, and where in the log the run begins.
    """
    command.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # DeepSpeed finds ninja, which belongs to this environment, through PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", UNASKED: "1"}
    with command.log.open("ab") as log:
        start = log.tell()
        log.write((without_secrets(shlex.join(command.argv)) + "\n").encode())
        log.flush()
        process = subprocess.Popen(
            command.argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
        assert process.stdout is not None
        with passing_signals_on(process) as passed_on, process.stdout:
            # Whatever has arrived, not whole lines: progress bars rewrite theirs.
            while chunk := os.read(process.stdout.fileno(), 65536):
                log.write(chunk)
                log.flush()
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
            code = process.wait()
    said = last_lines(command.log, SEARCHED_LINES, start=start) if command.is_launched else []
    return code, was_stopped(code, said, passed_on), start


@contextmanager
def passing_signals_on(process: subprocess.Popen) -> Iterator[list[int]]:
    """Inside, a request to stop goes to the step, which ends in its own time; a failure here ends it, too.

    Yields the signals that were passed on.
    """
    passed_on: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        passed_on.append(number)
        process.send_signal(number)

    before = {
        number: signal.signal(number, pass_on)
        for number in STOPPING
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield passed_on
    except BaseException:
        process.terminate()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def was_stopped(code: int, said: Sequence[str], passed_on: Sequence[int]) -> bool:
    """Whether a step ended because it was asked to: by its exit code, or by what it said under a launcher.

    `said` are the lines of this run, of a step under a launcher, which may have exit codes of its own;
    `passed_on` are the signals that the step got from here, and may have got before it listened.
    """
    if code == EXIT_TRY_AGAIN or any(code in (-number, 128 + number) for number in passed_on):
        return True
    return code not in (0, EXIT_BAD_INPUT) and any(re.search(STOPPED, line) for line in said)
