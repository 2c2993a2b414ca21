"""A command of the user's that measures exported models: --eval_command."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dschat.arguments import RunArguments
from dschat.console import messages
from dschat.distributed.collectives import broadcast_from_rank_0
from dschat.runs.registry import MEASURED

LOOK = 5.0
"""Seconds that ranks wait for rank 0 at once: far below the time-out of a collective."""
LAST_BYTES, LAST_LINES, MOST_NUMBERS = 2**20, 5, 200
OF_THE_GROUP = re.compile(
    r"(LOCAL_|GROUP_)?RANK|(LOCAL_|GROUP_|ROLE_)?WORLD_SIZE|MASTER_\w+|TORCHELASTIC_\w+|ROLE_\w+"
)
"""Environment variables by which a program would join this run's process group."""
WATCHED = 'exec 3<&0 </dev/null; (read -r _ <&3; kill -KILL 0) & exec 3<&-; exec /bin/sh -c "$0"'
"""Runs the command $0, and ends its group once nobody holds the other end of stdin: rank 0 was killed."""


@dataclass
class EvalCommand:
    """Runs the command on a model's folder. It ends no run: what goes wrong is a warning."""

    command: str
    """{model} in it stands for the folder, quoted for the shell."""
    seconds: float

    @staticmethod
    def of(run: RunArguments) -> "EvalCommand | None":
        """That of the flags."""
        if run.eval_command is None or run.output_dir is None:
            return None
        return EvalCommand(run.eval_command, run.eval_command_timeout)

    def run(self, folder: Path, step: int) -> dict[str, float]:
        """The numbers of the command's last line of JSON, under `MEASURED`.

        `step` is that of the model. Every rank must call it.
        """
        command = self.command.replace("{model}", shlex.quote(str(folder.resolve())))
        ended, lines = run_on_rank_0(command, self.seconds)
        found = numbers_of(lines) if ended == 0 else {}
        if not found:
            how = "printed no line of JSON with numbers" if ended == 0 else f"ended with exit code {ended}"
            how = f"ran longer than --eval_command_timeout {self.seconds:g} s" if ended is None else how
            messages.warning(
                f"--eval_command {how}; the run goes on without its numbers. Its last lines: {shown(lines)}"
            )
            return {}
        listed = ", ".join(f"{name} {value:.4g}" for name, value in list(found.items())[:8])
        messages.info(f"--eval_command, step {step}: {listed}")
        return found


def run_on_rank_0(command: str, seconds: float = math.inf) -> tuple[int | None, list[str]]:
    """Run a shell's command outside of the process group, on rank 0: its exit code and its last lines.

    The code is None where the command ran out of time and was ended. The other ranks wait in collectives of
    some seconds. Every rank must call it.
    """
    work, found = _work(command, seconds), None
    while found is None:
        found = broadcast_from_rank_0(lambda: next(work))
    return found


def _work(command: str, seconds: float) -> Iterator[tuple[int | None, list[str]] | None]:
    """None while the command runs, then its exit code and its last lines."""
    environment = {name: value for name, value in os.environ.items() if not OF_THE_GROUP.fullmatch(name)}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            ["/bin/sh", "-c", WATCHED, command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        deadline, ended = time.monotonic() + seconds, None
        try:
            while ended is None and time.monotonic() < deadline:
                with suppress(subprocess.TimeoutExpired):
                    ended = process.wait(min(LOOK, max(0.0, deadline - time.monotonic())))
                if ended is None:
                    yield None
        finally:
            with suppress(ProcessLookupError):  # what it started may go on, or it ran out of time
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()  # waits, and closes the pipe
        size = output.seek(0, os.SEEK_END)
        output.seek(max(0, size - LAST_BYTES))
        lines = [line for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    yield ended, lines


def shown(lines: list[str]) -> str:
    """The last lines in one."""
    return " | ".join(lines[-LAST_LINES:])[-2000:]


def numbers_of(lines: list[str]) -> dict[str, float]:
    """The finite numbers in the last line that is a JSON object, by their names, those within others joined
    by slashes."""
    for line in reversed(lines):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return dict(list(_flat(value, MEASURED))[:MOST_NUMBERS])
    return {}


def _flat(value: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, item in value.items():
        path = prefix + re.sub(r"[^\w.,:@=+-]+", "_", str(name))[:100]
        if isinstance(item, dict):
            yield from _flat(item, f"{path}/")
        elif isinstance(item, int | float) and not isinstance(item, bool) and math.isfinite(item):
            yield path, item
