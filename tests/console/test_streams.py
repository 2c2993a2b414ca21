"""Output ends no run and steers no terminal, and the log file has it all."""

import os
import pty
import subprocess
import sys

import pytest
from processes import environment

from dschat.console.text import printable

ALL = "é 茶 \U0001f600 \x1b[2J\x1b[31mred\x1b[0m \x08\x9b \u202e"
PROGRAM = """
import logging, os, sys, warnings
from pathlib import Path
from dschat.console.streams import log_of_streams
from dschat.console.text import PLAIN
from dschat.program import readable_errors
with readable_errors():
    print("early")
    if len(sys.argv) > 1:
        log_of_streams().open(Path(sys.argv[1]))
    for _ in range(20):
        print({text!r}, flush=True)
        print({text!r}, file=sys.stderr)
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm
    for i in tqdm(range(3), desc="bar"):
        tqdm.write("beside the bar")
    table = Table(title="[/]")
    table.add_row("[red]:smile:[/")
    Console(**PLAIN).print(table)
    warnings.warn("warned")
    logging.warning("logged")
    os.system("echo below python")
    print("unflushed", end="")
"""


def run(shell: str = "", *arguments: object, **extra: str) -> subprocess.CompletedProcess:
    """The program with what the shell does to its streams; extra environment variables."""
    program = [sys.executable, "-c", PROGRAM.format(text=ALL), *map(str, arguments)]
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$@" {shell}', "bash", *program],
        capture_output=True, env=environment(**extra), timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["| head -n 1", "2>&1 | head -n 1", "| true", ">&-", "2>&-", ">&- 2>&- <&-",
                                   ">/dev/full", ">/dev/full 2>&1"])  # fmt: skip
def test_a_program_goes_on_without_a_reader_and_its_log_has_every_line(shell, tmp_path):
    log = tmp_path / "log.txt"
    result = run(shell, log)
    assert result.returncode == 0
    for trace in (b"Traceback", b"Exception ignored", b"Errno"):
        assert trace not in result.stdout + result.stderr
    lines = log.read_text(encoding="utf-8").splitlines()
    assert lines.count("beside the bar") == 3
    assert sum("茶" in line for line in lines) == 40


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "gbk", "utf-8", "ascii:strict"])
def test_characters_that_an_encoding_lacks_are_escaped(encoding, tmp_path):
    result = run("", tmp_path / "log.txt", PYTHONIOENCODING=encoding)
    assert result.returncode == 0, result.stderr
    first = result.stdout.splitlines()[1].decode(encoding.partition(":")[0])
    expected = "é 茶 \U0001f600 \\x1b[2Jred \\x08\\x9b \\u202e"
    assert first == expected.encode(encoding.partition(":")[0], "backslashreplace").decode(
        encoding.partition(":")[0]
    )
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()[2] == expected


@pytest.mark.slow
def test_an_ascii_locale_makes_no_difference_to_files_and_arguments(tmp_path):
    program = (
        "import sys; from pathlib import Path\n"
        "from dschat.program import readable_errors\n"
        "with readable_errors():\n"
        "    Path(sys.argv[1]).write_text('é 茶')\n"
        "    print('é', *sys.argv[2:])\n"
        "    sys.exit(3)\n"
    )
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, tmp_path / "program.py", tmp_path / "é.txt", "", "a b"],
        env=environment(LC_ALL="C", PYTHONUTF8="0"), capture_output=True, check=False,
    )  # fmt: skip
    assert result.returncode == 3
    assert result.stdout == b"\\xe9  a b\n"
    assert (tmp_path / "é.txt").read_text(encoding="utf-8") == "é 茶"


@pytest.mark.slow
def test_the_log_goes_on_where_it_was_and_has_bars_only_as_they_end(tmp_path):
    log = tmp_path / "log.txt"
    for _ in range(2):
        run("", log)
    lines = log.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("==")] == [lines[0], lines[len(lines) // 2]]
    assert lines[1] == "early"
    assert len([line for line in lines if line.startswith("bar: ")]) == 2
    assert all("100%" in line for line in lines if line.startswith("bar: "))
    assert sum("[red]:smile:[/" in line for line in lines) == 2
    assert any("warned" in line for line in lines)
    assert any("logged" in line for line in lines)


def test_on_a_terminal_colours_pass_and_nothing_else_does():
    terminal, program_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(text=ALL)],
        stdout=program_end,
        stderr=program_end,
        env=environment(),
    )
    os.close(program_end)
    shown = b""
    try:
        while chunk := os.read(terminal, 65536):
            shown += chunk
    except OSError:  # its other end is closed
        pass
    os.close(terminal)
    assert process.wait() == 0
    assert "\\x1b[2J\x1b[31mred\x1b[0m \\x08\\x9b \\u202e" in shown.decode()
    assert b"\x1b[2J" not in shown


@pytest.mark.slow
def test_a_terminal_that_goes_away_ends_nothing(tmp_path):
    terminal, program_end = pty.openpty()
    code = "import os, sys, time; time.sleep(1)\n" + PROGRAM.format(text=ALL)
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "log.txt"],
        stdout=program_end,
        stderr=program_end,
        env=environment(),
    )
    os.close(program_end)
    os.close(terminal)
    assert process.wait() == 0
    assert "beside the bar" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_a_reader_that_is_slow_on_a_pipe_that_does_not_block_gets_everything():
    code = "import os\nos.set_blocking(1, False)\n" + (
        "from dschat.console.streams import take_over\ntake_over()\nfor i in range(40000): print(i)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment())
    with process.stdout:
        lines = process.stdout.read().split()
    assert process.wait() == 0
    assert [*map(int, lines)] == [*range(40000)]


def test_printable_leaves_what_languages_need():
    text = "tab\tline\nनक्\u200dष, या\u200cय 👩\u200d🚀 \u3000全角\u00a0!"
    assert printable(text) == text
    assert printable("a\r\x00\x7f\x85\u2028\u2066\ud800") == r"a\r\x00\x7f\x85\u2028\u2066\ud800"
