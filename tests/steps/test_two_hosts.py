"""Steps on two hosts, which are network namespaces of this machine; see two_hosts.py."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import ROOT, python
from safetensors.torch import load_file
from tiny import save_counting_pairs, save_tiny_model
from two_hosts import NAMES, TwoHosts, missing_right, two_hosts

SFT, REWARD, PPO = (ROOT / name / "main.py" for name in ("step1_sft", "step2_reward", "step3_ppo"))
EQUAL = ("--dtype", "fp32", "--packing", "off")
WHY = missing_right()
pytestmark = pytest.mark.skipif(WHY is not None, reason=str(WHY))


@pytest.fixture
def hosts(tmp_path) -> Iterator[TwoHosts]:
    save_counting_pairs(tmp_path / "pairs.jsonl")
    save_tiny_model(tmp_path / "base")
    with two_hosts(tmp_path) as hosts:
        yield hosts


def torchrun(*flags: str, nnodes: str = "2") -> list[str]:
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "10.77.0.1:29400", "--rdzv_id", "run"]
    return ["torchrun", "--nnodes", nnodes, "--nproc_per_node", "1", *meeting, *flags]


def sft(folder: Path, *more: object) -> list[str]:
    """Step 1 of eight optimiser steps per epoch."""
    flags = ["--model_name_or_path", "base", "--data_path", "pairs.jsonl", "--output_dir", folder, *EQUAL]
    flags += ["--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1, "--data_split", "1,0,0"]
    return [str(word) for word in (SFT, *flags, *more)]


def start(hosts: TwoHosts, command: list[str]) -> list[subprocess.Popen]:
    """The same command on both hosts, each with a home of its own."""
    return [hosts.popen(name, *command, XDG_CACHE_HOME=str(hosts.folder / f"home.{name}")) for name in NAMES]


def outputs(processes: list[subprocess.Popen], *codes: int, timeout: float = 240) -> list[str]:
    """What they print until they end, with one of these exit codes."""
    try:
        texts = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    for process, text in zip(processes, texts, strict=True):
        assert process.returncode in codes, text[-6000:]
    return texts


def losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def wait_for_steps(folder: Path, number: int) -> None:
    end = time.monotonic() + 200
    while not (folder / "metrics.jsonl").is_file() or len(losses(folder)) < number:
        assert time.monotonic() < end
        time.sleep(0.2)


def test_two_hosts_with_disks_of_their_own_train_and_both_have_the_model(hosts):
    hosts.give_own_disks()
    flags = ["--max_train_samples", "24", "--save_interval", "2", "--zero_stage", "2"]
    first, second = outputs(start(hosts, torchrun(*sft(Path("disk/out"), *flags))), 0)
    assert "2 hosts do not share --output_dir disk/out (node-a; node-b)" in first
    assert "tokenising" in first
    assert "tokenising" in second, "a host that shares no cache makes its own tokens"
    disks = [hosts.folder / f"disk.{name}" / "out" for name in NAMES]
    assert len(losses(disks[0])) == 3
    for rank, disk in enumerate(disks):
        files = {path.name for path in (disk / "checkpoints" / "step_00000003").rglob("*")}
        assert {f"rank_{r:05d}.json" for r in range(2)} & files == {f"rank_{rank:05d}.json"}
        assert (disk / "summary.json").is_file()
    models = [load_file(disk / "model.safetensors") for disk in disks]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def three_steps(run, folder: Path) -> None:
    """`run(command)` each step in turn, on few rows; `folder` is as the hosts see it."""
    rows = ["--max_train_samples", "16", "--zero_stage", "1", "--save_interval", "2"]
    run(sft(folder / "sft", *rows, "--data_split", "2,4,4"))
    reward = ["--model_name_or_path", folder / "sft", "--output_dir", folder / "reward", *rows]
    data = ["--data_path", "pairs.jsonl", *EQUAL]
    run([str(word) for word in (REWARD, *data, *reward, "--per_device_train_batch_size", 4)])
    ppo = ["--actor_model_name_or_path", folder / "sft", "--critic_model_name_or_path", folder / "reward"]
    ppo += ["--per_device_generation_batch_size", 4, "--per_device_training_batch_size", 4]
    ppo += ["--max_prompt_seq_len", 96, "--max_answer_seq_len", 8, "--max_train_samples", 16]
    ppo += ["--gradient_accumulation_steps", 1, "--output_dir", folder / "ppo", "--actor_zero_stage", 1]
    run([str(word) for word in (PPO, *data, *ppo)])


@pytest.mark.parametrize("disks", ["own", "shared"])
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
@pytest.mark.slow
@pytest.mark.matrix
def test_all_three_steps(hosts, launcher, disks):
    """deepspeed's ssh and pdsh are stand-ins that enter the namespace; all else is its launcher's."""
    if disks == "own":
        hosts.give_own_disks()
    folder = Path("disk" if disks == "own" else "one")
    (hosts.folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in NAMES))

    def run(command: list[str]) -> None:
        if launcher == "torchrun":
            outputs(start(hosts, torchrun(*command)), 0)
        else:
            line = ["python", ROOT / "scripts" / "launch.py", "--hostfile", "hostfile", *command]
            outputs([hosts.popen(NAMES[0], *line)], 0)

    three_steps(run, folder)
    places = [hosts.folder / f"disk.{name}" for name in NAMES] if disks == "own" else [hosts.folder / "one"]
    actors = [load_file(place / "ppo" / "actor" / "model.safetensors") for place in places]
    assert all(torch.equal(actors[0][name], actors[-1][name]) for name in actors[0])


@pytest.mark.slow
@pytest.mark.matrix
def test_losses_on_two_hosts_are_those_of_one_process(hosts):
    outputs(start(hosts, torchrun(*sft(hosts.folder / "two", "--zero_stage", 2))), 0)
    python(*sft(hosts.folder / "one", "--gradient_accumulation_steps", 2), cwd=hosts.folder)
    assert losses(hosts.folder / "two") == pytest.approx(losses(hosts.folder / "one"), abs=1e-4)


@pytest.mark.parametrize("disks", ["own", "shared"])
@pytest.mark.slow
@pytest.mark.matrix
def test_a_cut_link_ends_both_hosts_and_the_run_goes_on_bit_by_bit(hosts, disks):
    if disks == "own":
        hosts.give_own_disks()
    out = Path("disk/out" if disks == "own" else "one")
    seen = hosts.folder / ("disk.node-a/out" if disks == "own" else "one")
    flags = ["--zero_stage", 2, "--num_train_epochs", 8, "--save_interval", 2, "--host_timeout", 8]
    command = torchrun(*sft(out, *flags, "--resume_from_checkpoint", "latest"))
    processes = start(hosts, command)
    wait_for_steps(seen, 4)
    hosts.set_link("down")
    cut = time.monotonic()
    try:
        texts = outputs(processes[:1], 1, timeout=60)
        texts += outputs(processes[1:], -signal.SIGKILL, timeout=60)
    finally:
        print(f"ended {time.monotonic() - cut:.0f} s after the cut")
    assert "no answer from node-b (rank 1) for 8 s (--host_timeout)" in texts[0]
    assert "no answer from node-a (rank 0) for 8 s (--host_timeout)" in texts[1]
    assert "torchrun on this host is killed if it has not ended in 15 s" in texts[1]
    hosts.set_link("up")
    resumed, _ = outputs(start(hosts, command), 0)
    assert "going on from checkpoint" in resumed
    outputs(start(hosts, torchrun(*sft(hosts.folder / "straight", *flags))), 0)
    assert losses(seen) == losses(hosts.folder / "straight")


@pytest.mark.slow
@pytest.mark.matrix
def test_a_lost_host_leaves_a_run_that_goes_on_by_itself_on_the_other(hosts):
    flags = ["--zero_stage", 1, "--num_train_epochs", 8, "--save_interval", 2, "--host_timeout", 8]
    command = torchrun(
        *("--max_restarts", "3", *sft(hosts.folder / "out", *flags, "--resume_from_checkpoint", "latest")),
        nnodes="1:2",
    )
    hosts.more = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    left, lost = start(hosts, command)
    wait_for_steps(hosts.folder / "out", 4)
    hosts.set_link("down")
    os.killpg(lost.pid, signal.SIGKILL)
    (text,) = outputs([left], 0, timeout=400)
    assert "no answer from node-b" in text
    assert "is of 2 ranks and there are 1: the run starts again with" in text
    assert len(losses(hosts.folder / "out")) == 8 * 8
    assert (hosts.folder / "out" / "summary.json").is_file()


@pytest.mark.slow
@pytest.mark.matrix
def test_the_cluster_is_checked(hosts):
    hosts.give_own_disks()
    check = torchrun(str(ROOT / "scripts" / "check_cluster.py"), "--storage", "disk")
    first, _ = outputs(start(hosts, [*check, "--min_space", "0", "--min_bandwidth", "0"]), 0)
    assert "2 ranks on 2 hosts met at" in first
    assert "storage: disk is another disk on each host" in first
    assert "bandwidth between node-a and node-b" in first
    assert "nothing is wrong" in first
    first, _ = outputs(start(hosts, [*check, "--min_space", "1e9", "--min_bandwidth", "1e9"]), 1)
    assert "PROBLEM: --storage on node-b has" in first
    assert "are less than --min_bandwidth" in first
