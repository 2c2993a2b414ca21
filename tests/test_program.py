"""How a program starts and ends."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, environment
from safetensors import SafetensorError
from tqdm import tqdm

from dschat.errors import UserError
from dschat.program import readable_errors

FOLDERS = ("step1_sft", "step2_reward", "step3_ppo", "scripts", "benchmarks")
HAS_FLAGS = re.compile(r"run_step\(|parse_arguments\(|ArgumentParser\(|ReadableParser\(|--hostfile")
OF_OTHER_ENVIRONMENTS = ("learning_trl.py", "versus_trl.py")
"""Programs for a Python that has a peer of this project, which they import first."""
WITHOUT_FLAGS = ("write_hardware.py",)
"""They parse command lines of steps and have none of their own."""
HEAVY = ("torch", "transformers", "datasets", "deepspeed", "pandas")


def test_a_rank_that_is_no_number_is_named_before_anything_reads_it(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(SystemExit) as ended, readable_errors():
        pass
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: RANK='one' must be a whole number; correct it or unset it.\n"
    monkeypatch.setenv("RANK", " ")
    with readable_errors():
        assert "RANK" not in os.environ


def test_the_last_message_stands_in_a_line_of_its_own_beside_a_progress_bar(capsys):
    bar = tqdm(total=2, file=sys.stderr)
    with pytest.raises(SystemExit), readable_errors():
        raise UserError("no more data")
    bar.close()
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert "error: no more data" in lines


@pytest.mark.parametrize(("error", "code"), [(UserError("give another file"), 2), (KeyboardInterrupt(), 130)])
def test_an_error_for_people_is_one_line_and_an_exit_code(error, code, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as ended, readable_errors():
        raise error
    assert ended.value.code == code
    assert capsys.readouterr().err.strip() in ("error: give another file", "interrupted")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "out/summary.json"),
        OSError(errno.EROFS, "Read-only file system"),
        SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
    ],
)
def test_a_disk_that_takes_no_more_is_no_bug(error, capsys):
    with pytest.raises(SystemExit) as ended, readable_errors():
        raise error
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: nothing more can be written: ")
    assert "--resume_from_checkpoint latest" in told


def test_debug_and_bugs_keep_their_traceback():
    with pytest.raises(UserError), readable_errors(debug=True):
        raise UserError("x")
    with pytest.raises(ZeroDivisionError), readable_errors():
        raise ZeroDivisionError


STEP = """
import sys

from dschat.program import run_step

if __name__ == "__main__":
    run_step("sft", __file__)

print("imported for", __name__)


def main(args, context):
    print("torch" in sys.modules, args.run.seed, context.description.run is args.run)
    sys.exit(3)
"""


@pytest.mark.slow
def test_a_step_is_imported_once_its_flags_are_known_to_be_good(tmp_path):
    (tmp_path / "a_step").mkdir()
    program = tmp_path / "a_step" / "main.py"
    program.write_text(STEP)
    good = ["--model_name_or_path=m", "--data_path=d", "--dtype=fp32", "--seed=5"]
    env = environment(PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    for flags, code, printed in (
        (["--sed=5"], 2, []),
        (good, 3, ["imported for a_step.main", "True 5 True"]),
    ):
        result = subprocess.run(
            [sys.executable, program, *flags], capture_output=True, text=True, env=env, check=False
        )
        assert result.returncode == code, result.stderr
        assert [line for line in result.stdout.splitlines() if not line.startswith("[")] == printed


def programs() -> list[Path]:
    """The files that are started and have flags."""
    files = (path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py")))
    texts = {
        path: path.read_text(encoding="utf-8")
        for path in files
        if path.name not in (*OF_OTHER_ENVIRONMENTS, *WITHOUT_FLAGS)
    }
    return [path for path, text in texts.items() if "__main__" in text and HAS_FLAGS.search(text)]


@pytest.mark.parametrize("program", programs(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_help_answers_before_anything_heavy_is_imported(program):
    code = (
        "import runpy, sys\n"
        "sys.argv = ['main.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(program)!r}, run_name='__main__')\n"
        "except SystemExit:\n"
        f"    print('imported:', *({set(HEAVY)} & sys.modules.keys()))\n"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    assert "--" in result.stdout
    assert result.stdout.rstrip().endswith("imported:")
