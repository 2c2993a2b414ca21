"""What libraries say of their own work is in the log and not on the console."""

import subprocess
import sys

import pytest
from processes import environment

PROGRAM = """
import logging, sys, warnings
from pathlib import Path
from dschat.console import messages
from dschat.console.streams import log_of_streams
from dschat.program import readable_errors
with readable_errors():
    import dschat.models
    from dschat.console.chatter import prints_in_log
    from transformers.utils import logging as transformers_logging
    deepspeed = logging.getLogger("DeepSpeed")
    deepspeed.addHandler(logging.StreamHandler(sys.stdout))
    deepspeed.warning("Setting accelerator to CPU.")
    log_of_streams().open(Path(sys.argv[1]))
    for _ in transformers_logging.tqdm(range(3), desc="Loading weights"):
        pass
    deepspeed.error("something failed")
    with prints_in_log():
        print("* Trackio project initialized")
    print("from a library")
    messages.info("loading the actor")
    messages.note("mine", every_rank=True)
    if sys.argv[2:]:
        raise RuntimeError("a bug")
"""


def run(path, rank: str, *arguments: str) -> tuple[str, list[str]]:
    program = [sys.executable, "-c", PROGRAM, str(path), *arguments]
    env = environment(RANK=rank, WORLD_SIZE="2")
    result = subprocess.run(program, capture_output=True, env=env, text=True, timeout=120, check=False)
    return result.stdout + result.stderr, path.read_text(encoding="utf-8").splitlines()


@pytest.mark.slow
def test_rank_0_prints_what_is_for_people(tmp_path):
    told, log = run(tmp_path / "log.txt", "0")
    assert told.splitlines() == ["something failed", "from a library", "loading the actor", "note: mine"]
    assert "DeepSpeed: WARNING: Setting accelerator to CPU." in log
    assert any(line.startswith("Loading weights: 100%") and "3/3" in line for line in log)
    assert "* Trackio project initialized" in log
    assert set(told.splitlines()) <= set(log)


@pytest.mark.slow
def test_another_rank_prints_its_own_messages_and_errors_alone(tmp_path):
    told, log = run(tmp_path / "log.txt", "1", "fails")
    assert told.startswith("note: mine\nTraceback")
    assert told.endswith("RuntimeError: a bug\n")
    assert "[rank 1] from a library" in log
    assert "[rank 1] DeepSpeed: WARNING: Setting accelerator to CPU." in log
