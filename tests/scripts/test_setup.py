"""scripts/setup.sh with interpreters and a pip that only pretend."""

import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

INTERPRETER = """#!/usr/bin/env bash
# VERSION and PIP are set by the test: what `version_of` is answered, and what pip does.
case "$*" in
*"import torch"*) exit 1 ;;
"-c "*) echo "VERSION" ;;
--version) echo "Python VERSION.0" ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip --version") ;;
"-m pip config list") ;;
"-m pip install "*) PIP ;;
esac
"""


@pytest.fixture
def project(tmp_path):
    """A folder with what setup.sh reads, and bin/ in place of the system's interpreters."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for tool in (
        "bash",
        "cat",
        "cksum",
        "cp",
        "dirname",
        "grep",
        "mkdir",
        "mktemp",
        "rm",
        "sed",
        "sleep",
        "tail",
    ):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    return tmp_path


def interpreter(project: Path, name: str, version: str, pip: str = "true") -> None:
    path = project / "bin" / name
    path.write_text(INTERPRETER.replace("VERSION", version).replace("PIP", pip))
    path.chmod(0o755)


def set_up(project: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {"PATH": str(project / "bin"), "HOME": str(project)} | variables
    command = ["bash", str(project / "scripts" / "setup.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_no_supported_interpreter_ends_before_anything_is_downloaded(project):
    interpreter(project, "python3", "3.10", pip="touch downloaded")
    interpreter(project, "python3.12", "3.12 without venv", pip="touch downloaded")
    done = set_up(project)
    assert done.returncode == 1
    assert "found: python3 is 3.10, python3.12 is 3.12 without venv. Nothing was downloaded." in done.stderr
    assert "sudo apt install python3 python3-venv" in done.stderr
    assert not (project / ".venv").exists()
    assert not (project / "downloaded").exists()


@pytest.mark.parametrize("version", ["3.9", "3.10", "3.15", "3.14 free-threaded", "2.7"])
def test_an_interpreter_that_is_asked_for_and_not_supported_is_refused_by_name(project, version):
    interpreter(project, "python3", "3.11")
    interpreter(project, "other", version)
    done = set_up(project, PYTHON="other")
    assert done.returncode == 1
    assert f"error: PYTHON=other is Python {version}, and Python 3.11, 3.12, 3.13 or 3.14" in done.stderr
    assert not (project / ".venv").exists()


def test_an_interpreter_that_is_missing_is_refused_by_name(project):
    done = set_up(project, PYTHON="nowhere/python")
    assert "error: PYTHON=nowhere/python is no Python that starts" in done.stderr


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_the_users_own_python3_comes_first_where_it_is_supported(project, version):
    interpreter(project, "python3", version)
    interpreter(project, "python3.12", "3.12")
    done = set_up(project)
    assert done.returncode == 0, done.stderr
    assert f"== Python {version}.0, python3\n" in done.stdout


def test_another_interpreter_is_taken_where_python3_is_too_old(project):
    interpreter(project, "python3", "3.9")
    interpreter(project, "python3.14", "3.14")
    assert "== Python 3.14.0, python3.14\n" in set_up(project).stdout


def test_the_second_time_says_nothing_and_another_PYTHON_makes_it_again(project):
    interpreter(project, "python3", "3.11")
    interpreter(project, "python3.13", "3.13")
    assert "ready" in set_up(project).stdout
    assert set_up(project).stdout == ""
    again = set_up(project, PYTHON="python3.13")
    assert ".venv belongs to another Python" in again.stdout
    assert "== Python 3.13.0, python3.13" in again.stdout


@pytest.mark.parametrize(
    ("problem", "remedy"),
    [
        (
            "ERROR: No matching distribution found for torch==2.13.0",
            "The index has no such version for Python",
        ),
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            "Make room",
        ),
        ("ERROR: HTTPSConnectionPool: Read timed out.", "https_proxy names a proxy"),
        ("ERROR: something new", "has pip's whole output"),
    ],
)
def test_a_failure_of_pip_is_one_message_with_its_remedy(project, problem, remedy):
    interpreter(project, "python3", "3.12", pip=f'echo Collecting torch; echo "{problem}" >&2; exit 1')
    done = set_up(project)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: torch could not be installed: {problem.removeprefix('ERROR: ')}")
    assert remedy in done.stderr
    assert "Collecting torch" in (project / ".venv" / "install.log").read_text()
    assert not (project / ".venv" / "installed").exists()


@pytest.mark.slow
def test_the_first_line_comes_at_once_and_pip_is_followed(project):
    interpreter(project, "python3", "3.12", pip="echo 'Installing collected packages: torch, numpy'; sleep 6")
    start = time.monotonic()
    process = subprocess.Popen(
        ["bash", str(project / "scripts" / "setup.sh")],
        env={"PATH": str(project / "bin"), "HOME": str(project)},
        stdout=subprocess.PIPE,
        text=True,
    )
    first = process.stdout.readline()
    seconds = time.monotonic() - start
    progress = next(line for line in process.stdout if line.startswith("   ") and " s: " in line)
    process.kill()
    process.wait()
    assert first == "== setting up dschat in .venv (minutes; only this once)\n"
    assert seconds < 5  # under 1 s on a machine that is not loaded
    assert progress.endswith(" s: unpacking 2 packages\n")


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="a GPU is here")
def test_a_machine_without_a_gpu_is_told_of_the_cpu_build(project):
    interpreter(project, "python3", "3.12")
    assert "start the same command again behind PIP_EXTRA_INDEX_URL=ADDRESS" in set_up(project).stdout


def test_the_versions_that_setup_takes_are_those_of_pyproject():
    text = (ROOT / "scripts" / "setup.sh").read_text()
    oldest, newest = (int(text.split(f"{name}=")[1].split()[0]) for name in ("oldest", "newest"))
    assert f'requires-python = ">=3.{oldest},<3.{newest + 1}"' in (ROOT / "pyproject.toml").read_text()
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    assert ", ".join(f'"3.{minor}"' for minor in range(oldest, newest + 1)) in workflow
