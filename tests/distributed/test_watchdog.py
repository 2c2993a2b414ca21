"""A rank that is gone ends the others, with a message that names it."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from processes import ROOT, environment, python

from dschat.distributed import watchdog

WORKER = ROOT / "tests" / "workers" / "lose_a_rank.py"


@pytest.mark.slow
@pytest.mark.parametrize("waiting", ["collective", "sleep"])
def test_the_others_end_and_name_it(waiting):
    result = python(WORKER, waiting, ranks=2, check=False, timeout=300, afresh=True)
    assert result.returncode == 1
    assert "error: rank 1 (process " in result.stderr
    assert "--resume_from_checkpoint latest" in result.stderr
    assert result.stderr.count("ended before this rank") == 1


@pytest.mark.slow
def test_the_deepspeed_launcher_too():
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29731"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = subprocess.run(
        [*command, str(WORKER), "sleep"],
        capture_output=True, text=True, env=environment(PATH=path), timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode != 0
    assert "error: rank 1 (process " in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells")
def test_ranks_end_with_a_launcher_that_is_killed(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen([*launcher, str(WORKER), str(tmp_path)], env=environment())
    while len(list(tmp_path.iterdir())) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    ranks = [int(path.name) for path in tmp_path.iterdir()]
    assert not any(map(watchdog.is_gone, ranks))
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while not all(map(watchdog.is_gone, ranks)):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_process_is_gone_once_it_has_ended_though_nobody_waited_for_it():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert not watchdog.is_gone(process.pid)
    process.stdin.close()
    time.sleep(1)
    assert watchdog.is_gone(process.pid)
    process.wait()
    assert watchdog.is_gone(process.pid)


def test_only_the_lowest_rank_left_speaks(capsys, monkeypatch):
    monkeypatch.setattr(watchdog, "is_gone", lambda pid: pid == 10)
    for rank in (1, 2):
        others = {r: 10 + r for r in range(3) if r != rank}
        watch = watchdog.RankWatchdog(others, rank=rank)
        watch.report(watch.message())
        watch.stop()
    assert capsys.readouterr().err.count("error: rank 0 (process 10) ended") == 1


def test_the_watch_has_ended_when_ranks_may_though_it_was_waiting_for_the_store(monkeypatch):
    """A thread inside a store's call when the interpreter ends aborts the process."""
    monkeypatch.setattr(watchdog, "INTERVAL", 0.0)
    looks = []

    def slow_store() -> None:
        looks.append("begun")
        time.sleep(0.3)
        looks.append("over")

    watchdog.start_watching([os.getpid(), os.getpid()], [1, 1], rank=0, each_time=slow_store)
    while not looks:
        time.sleep(0.01)
    assert watchdog.stop_watching()
    assert looks[-1] == "over"
    assert not [thread for thread in threading.enumerate() if thread.name == "peer watch"]
    assert not watchdog.stop_watching()
