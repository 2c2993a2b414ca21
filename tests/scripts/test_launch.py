"""Arguments reach the programs on other hosts as they were given; a stand-in for pdsh has the shell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, environment

from dschat.distributed.rendezvous import free_port

PDSH = """#!/bin/bash
# pdsh -S -f N -w HOSTS COMMAND...: a shell for each host gets one line, in which %n is the host's number.
while [[ $1 == -* ]]; do case $1 in -f | -w) last=$2; shift 2;; *) shift;; esac; done
IFS=, read -ra hosts <<<"$last"
line="$*"
for number in "${!hosts[@]}"; do
    here=${line//%%/$'\\001'}
    here=${here//%n/$number}
    sh -c "${here//$'\\001'/%}" & running+=($!)
done
for process in "${running[@]}"; do wait "$process" || failed=1; done
exit ${failed:-0}
"""
PROGRAM = """
import json, os, sys
from pathlib import Path
Path(__file__).with_name("told." + os.environ["RANK"]).write_text(json.dumps([sys.argv[1:], os.getcwd()]))
"""
WORDS = ["<|im_end|>", "it's", 'a "b" c', "$HOME", "`id`", "a;b&c|d", "*", "~", "a\\b", "%n %h 100%", ""]
WORDS += ["#x", "(1)", "é", "--flag=<|x|>", "two\nlines", "{a,b}"]


@pytest.fixture
def hosts(tmp_path):
    """A folder with a space and a quote in its name, a hostfile of two hosts, and pdsh on PATH."""
    folder = tmp_path / "my 'runs'"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "pdsh").write_text(PDSH)
    (folder / "bin" / "pdsh").chmod(0o755)
    (folder / "hostfile").write_text("one slots=1\ntwo slots=1\n")
    (folder / "program.py").write_text(PROGRAM)
    return folder


def launch(hosts: Path, path: str) -> subprocess.CompletedProcess:
    flags = ["--hostfile", "hostfile", "--no_ssh_check", "--master_addr", "127.0.0.1"]
    flags += ["--master_port", str(free_port())]
    return subprocess.run(
        [sys.executable, ROOT / "scripts/launch.py", *flags, hosts / "program.py", *WORDS],
        cwd=hosts, env=environment(PATH=path), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_every_word_arrives_as_it_was_given(hosts):
    result = launch(hosts, os.pathsep.join([str(hosts / "bin"), os.environ["PATH"]]))
    assert result.returncode == 0, result.stderr[-3000:]
    for rank in range(2):
        arguments, folder = json.loads((hosts / f"told.{rank}").read_text())
        assert arguments == ["--local_rank=0", *WORDS]
        assert folder == str(hosts)


@pytest.mark.slow
def test_without_pdsh_one_line_says_so(hosts):
    result = launch(hosts, "/usr/bin:/bin")
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1] == "error: launcher 'pdsh' not installed."
