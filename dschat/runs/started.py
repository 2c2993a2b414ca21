"""How a run was started: its command, versions and commit, for the report on it."""

import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dschat.arguments import without_secrets

STARTED = "started.json"
LIBRARIES = ("dschat", "torch", "deepspeed", "transformers", "tokenizers", "datasets", "peft")
ROOT = Path(__file__).resolve().parents[2]


def how_started() -> dict[str, Any]:
    """The command without passwords, when it began, versions of libraries, and the checkout's commit."""
    versions = {"python": platform.python_version(), **installed_versions(LIBRARIES)}
    command = shlex.join([Path(sys.executable).name, *sys.argv])
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"command": without_secrets(command), "time": now, "versions": versions, "commit": _commit()}


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """By name, without what is not installed; dschat itself may run from a checkout that is not."""
    versions = {}
    for name in names:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _commit() -> str | None:
    """The commit of the checkout that runs, "+" where files differ from it; None of an installed wheel."""
    if not (ROOT / ".git").exists():
        return None
    try:
        answers = [
            subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=5)
            for words in (["rev-parse", "--short=12", "HEAD"], ["diff", "--quiet", "HEAD"])
        ]
    except (OSError, subprocess.TimeoutExpired):
        return None
    commit, difference = answers
    return commit.stdout.strip() + ("+" if difference.returncode == 1 else "") if commit.stdout else None
