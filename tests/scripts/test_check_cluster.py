"""What is wrong with a cluster is said in words with a remedy; two hosts in tests/steps/test_two_hosts.py."""

import re

import pytest
from processes import ROOT, python

from dschat.distributed.rendezvous import free_port
from scripts.check_cluster import problems


def host(name: str = "node-b", **other) -> dict:
    known = {
        "host": name,
        "local_size": 8,
        "versions": {"torch": "2.13.0", "deepspeed": "0.19.8"},
        "device": "NVIDIA H100",
        "devices": 8,
        "port_problem": None,
        "storage_problem": None,
        "free_gb": 100.0,
        "skew": 0.0,
    }
    return known | other


def test_nothing_is_wrong_with_equal_hosts():
    assert list(problems([host("node-a"), host()], 10)) == []


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"versions": {"torch": "2.12.1", "deepspeed": "0.19.8"}}, "torch is 2.12.1 on node-b and 2.13.0"),
        ({"device": "NVIDIA A100"}, "node-b has NVIDIA A100 and node-a NVIDIA H100"),
        ({"local_size": 4, "devices": 4}, "4 processes run on node-b and 8 on node-a"),
        ({"devices": 4}, "node-b shows 4 devices and runs 8 processes"),
        ({"port_problem": "permission denied"}, "node-b cannot listen on a port (permission denied)"),
        ({"storage_problem": "Read-only file system"}, "--storage on node-b cannot be written (Read-only"),
        ({"free_gb": 3.2}, "--storage on node-b has 3.2 GB left, less than --min_space 10"),
        ({"skew": -7.5}, "the clock of node-b is -7.5 s from that of node-a: synchronise"),
        ({"host": "node-a"}, "2 hosts have the name node-a"),
    ],
)  # fmt: skip
def test_each_fault_has_its_own_message_with_a_remedy(other, text):
    (message,) = problems([host("node-a"), host(**other)], 10)
    assert message.startswith(text)
    assert re.search(": [a-z]", message), "the remedy follows"


def test_ranks_that_do_not_come_end_the_check_with_a_message():
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    script = ROOT / "scripts" / "check_cluster.py"
    ended = python(script, "--meet_within", 2, env=env, check=False, timeout=100)
    assert ended.returncode == 2
    assert "1/2 clients joined. Start all 2 with these, and choose a port" in ended.stderr
    assert "Traceback" not in ended.stderr
