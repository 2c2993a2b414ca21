"""A forked program runs and ends as one that python or torchrun starts."""

import pytest
from processes import python

PROGRAM = """
import atexit, os, sys
atexit.register(print, "at the end")
print(sys.argv[1:], sys.path[0], os.getcwd(), __name__, __file__, os.environ["ADDED"], flush=True)
print("to stderr", file=sys.stderr)
exec(sys.argv[1])
"""
ENDS = ("pass", "sys.exit(3)", "sys.exit('why')", "os._exit(4)", "os.kill(os.getpid(), 9)", "1 / 0")
RANKS = """
import os, sys, time
import torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
if sys.argv[1] == "fail" and rank == 1:
    sys.exit("rank 1 fails")
if sys.argv[1] == "fail":
    time.sleep(600)
names = [None] * dist.get_world_size()
dist.all_gather_object(names, (rank, os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]))
print(names if rank == 0 else "")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_program_ends_as_python_ends_it(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    for end in ENDS:
        how = {"check": False, "cwd": tmp_path, "env": {"ADDED": "yes"}}
        forked, started = (python(program, end, afresh=afresh, **how) for afresh in (False, True))
        assert forked.returncode == started.returncode, end
        assert forked.stdout == started.stdout, end
        assert forked.stderr.splitlines()[:1] == started.stderr.splitlines()[:1]
        assert forked.stderr.splitlines()[-1:] == started.stderr.splitlines()[-1:]


@pytest.mark.slow
def test_ranks_meet_and_one_that_fails_ends_the_others(tmp_path):
    program = tmp_path / "ranks.py"
    program.write_text(RANKS)
    assert python(program, "meet", ranks=2).stdout.strip() == "[(0, '0', '2'), (1, '1', '2')]"
    failed = python(program, "fail", ranks=2, check=False, timeout=100)
    assert failed.returncode == 1
    assert "rank 1 fails" in failed.stderr
    with pytest.raises(AssertionError, match="rank 1 fails"):
        python(program, "fail", ranks=2, timeout=100)


@pytest.mark.slow
def test_a_program_that_takes_too_long_is_ended(tmp_path):
    program = tmp_path / "sleeps.py"
    program.write_text("import time; time.sleep(600)")
    with pytest.raises(TimeoutError, match="still running after 1 s"):
        python(program, timeout=1)
