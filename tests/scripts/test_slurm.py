"""The Slurm scripts and the Kubernetes manifest, run with stand-ins for what starts processes on hosts."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from processes import ROOT, environment

from dschat.arguments import parse_arguments

FLAGS = ["--model_name_or_path", "m", "--data_path", "a b.jsonl", "--output_dir", "out"]
JOB = {
    "SLURM_JOB_NODELIST": "gpu[07-10]",
    "SLURM_NNODES": "4",
    "SLURM_JOB_ID": "12",
    "SLURM_GPUS_ON_NODE": "8",
}
STUBS = {
    "srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"',
    "scontrol": "printf 'gpu07\\ngpu08\\ngpu09\\ngpu10\\n'",
    "torchrun": 'printf "%s\\0" "$@" >log',
    "python": 'printf "%s\\0" "$MASTER_PORT" "$@" >log',
}


def run(command: list[str], folder: Path, **variables: str) -> list[str]:
    """The words that the last stand-in was started with."""
    commands = folder / "bin"
    commands.mkdir()
    for name, text in STUBS.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    path = f"{commands}:{os.environ['PATH']}"
    subprocess.run(
        command, cwd=folder, env={**environment(), **variables, "PATH": path}, check=True, timeout=60
    )
    return (folder / "log").read_text().split("\0")[:-1]


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_slurm_starts_one_torchrun_per_node_that_meet_on_the_first(tmp_path):
    script = str(ROOT / "scripts" / "slurm" / "torchrun.sbatch")
    words = run([script, "step1_sft/main.py", *FLAGS], tmp_path, **JOB, MIN_NODES="1")
    assert value(words, "--nnodes") == "1:4"
    assert value(words, "--rdzv_endpoint") == "gpu07:29400"
    assert value(words, "--nproc_per_node") == "8"
    arguments = parse_arguments("sft", words[words.index("step1_sft/main.py") + 1 :])
    assert arguments.run.resume_from_checkpoint == "latest"
    assert arguments.data.data_path == ["a b.jsonl"]


def test_slurm_starts_the_ranks_itself_on_a_port_of_the_jobs_own(tmp_path):
    words = run(
        [str(ROOT / "scripts" / "slurm" / "srun.sbatch"), "step1_sft/main.py", *FLAGS], tmp_path, **JOB
    )
    assert words[:2] == ["20012", "step1_sft/main.py"]
    assert parse_arguments("sft", words[2:]).run.resume_from_checkpoint == "latest"


@pytest.mark.parametrize("kind", ["Master", "Worker"])
def test_the_command_of_each_pod_has_flags_that_exist(kind, tmp_path):
    manifest = yaml.safe_load((ROOT / "docs" / "pytorchjob.yaml").read_text(encoding="utf-8"))
    pod = manifest["spec"]["pytorchReplicaSpecs"][kind]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch", "the operator looks for that name"
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    told = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "dschat-sft-master-0", "MASTER_PORT": "23456"}
    words = run([*container["command"], *container["args"]], tmp_path, **told)
    assert [value(words, flag) for flag in ("--nnodes", "--node_rank")] == ["2", "1"]
    assert value(words, "--master_addr") == "dschat-sft-master-0"
    arguments = parse_arguments("sft", words[words.index("step1_sft/main.py") + 1 :])
    assert arguments.run.output_dir == "/data/output/step1_sft"
