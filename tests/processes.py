"""Start programs from tests, on one rank or several, as a user would."""

import os
import subprocess
import sys
from pathlib import Path

import forked

ROOT = Path(__file__).resolve().parents[1]
GROUP_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without the process group that a test may have joined."""
    inherited = {name: value for name, value in os.environ.items() if name not in GROUP_VARIABLES}
    paths = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    return {**inherited, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **extra}


def python(
    script: Path | str,
    *args: object,
    ranks: int = 1,
    check: bool = True,
    cwd: Path | None = None,
    timeout: int = 600,
    env: dict[str, str] | None = None,
    afresh: bool = False,
) -> subprocess.CompletedProcess:
    """Run a script as `python` does, or on several ranks as `torchrun` does; its output is in the result.

    `afresh` starts python or torchrun itself, for tests of how a program starts and ends. All others fork a
    process that has imported torch, transformers and DeepSpeed, which takes most of a small run's time.
    """
    argv, env = [str(script), *map(str, args)], environment(**(env or {}))
    if not afresh:
        result = forked.run(argv, ranks, env, cwd or Path.cwd(), timeout)
    else:
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        result = subprocess.run(
            [*launcher, *argv], capture_output=True, text=True, env=env, cwd=cwd, timeout=timeout, check=False
        )
    if check and result.returncode != 0:
        raise AssertionError(f"{script} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result
