"""Ranks of which one is killed: torchrun starts all again, and they go on from the last checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from alike_runs import EPSILON, assert_alike
from processes import ROOT, environment, python
from test_ppo_resume import HALF_A_RANK, STEERED, flags_of, save_models_and_pairs
from tiny import save_counting_pairs, save_tiny_model

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(3600)]

TENSOR, SEQUENCE, PIPELINE = (f"--{axis}_parallel_size=2" for axis in ("tensor", "sequence", "pipeline"))
CASES = {
    "tensor": ("sft", "llama", 2, TENSOR, "--zero_stage=1"),
    "tensor and data": ("dpo", "qwen3", 4, TENSOR, "--zero_stage=3"),
    "sequence": ("sft", "opt", 2, SEQUENCE, "--zero_stage=2"),
    "sequence and data": ("reward", "llama", 4, SEQUENCE, "--zero_stage=3"),
    "pipeline": ("reward", "gpt2", 2, PIPELINE, "--zero_stage=1"),
    "pipeline and data": ("sft", "llama", 4, PIPELINE, "--zero_stage=1"),
    "pipeline and tensor": ("dpo", "qwen3", 4, PIPELINE, TENSOR, "--zero_stage=0"),
    "data": ("reward", "opt", 2, "--zero_stage=2"),
    "data, offloaded": ("sft", "llama", 2, "--zero_stage=3", "--offload", "--gradient_checkpointing"),
    "data, adapters": ("dpo", "qwen3", 2, "--zero_stage=1", "--lora_dim=4"),
}
"""Step, family, ranks and further flags."""


def torchrun(worker: str, folder: Path, runs: list[dict], ranks: int) -> str:
    """What the runs print, started anew once when a rank is killed."""
    (folder / "killed.json").write_text(json.dumps(runs))
    torchrun = ["--standalone", "--nproc_per_node", str(ranks), "--max_restarts", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", *torchrun]
    command += [ROOT / "tests" / "workers" / worker, folder / "killed.json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert "exitcode: -9" in done.stderr
    return done.stdout


@pytest.mark.parametrize("case", CASES)
def test_steps_1_and_2_and_dpo(case, tmp_path):
    step, family, ranks, *more = CASES[case]
    save_counting_pairs(tmp_path / "pairs.jsonl")
    save_tiny_model(tmp_path / family, family)
    rows = 8 // (ranks // 2 ** sum(flag in more for flag in (TENSOR, SEQUENCE, PIPELINE)))

    def of(name: str, **fate: int) -> dict:
        paths = {"model_name_or_path": family, "data_path": "pairs.jsonl", "data_output_path": "cache"}
        flags = [f"--{flag}={tmp_path / path}" for flag, path in (paths | {"output_dir": name}).items()]
        flags += [
            f"--per_device_train_batch_size={rows}",
            "--learning_rate=1e-3",
            f"--adam_epsilon={EPSILON}",
        ]
        flags += ["--num_train_epochs=2", "--data_split=1,1,1", "--save_interval=2", "--dtype=fp32"]
        flags += ["--packing=off", "--pad_to_multiple_of=8", "--preprocessing_num_workers=1"]
        return {"program": step, "flags": [*flags, *more], **fate}

    (tmp_path / "whole.json").write_text(json.dumps([of("whole")]))
    python(ROOT / "tests" / "workers" / "interrupted_runs.py", tmp_path / "whole.json", ranks=ranks)
    said = torchrun("interrupted_runs.py", tmp_path, [of("killed", kill_in=4)], ranks)
    assert "going on from checkpoint" in said
    assert_alike(tmp_path / "whole", tmp_path / "killed", exactly=True)


@pytest.mark.parametrize(("stage", "tensor_ranks"), [(0, 2), (3, 2), (2, 1), (3, 1)])
def test_step_3(stage, tensor_ranks, tmp_path):
    save_models_and_pairs(tmp_path)
    options = {f"{model}_tensor_parallel_size": tensor_ranks for model in ("actor", "critic")}
    options |= {"actor_zero_stage": stage, "critic_zero_stage": stage, "save_interval": 2}
    options |= {"export_actor": "last", **STEERED, **HALF_A_RANK}
    ranks = 2 * tensor_ranks
    whole, killed = ({"flags": flags_of(tmp_path, name, options)} for name in ("whole", "killed"))
    (tmp_path / "whole.json").write_text(json.dumps([whole]))
    python(ROOT / "tests" / "workers" / "interrupted_ppo.py", tmp_path / "whole.json", ranks=ranks)
    said = torchrun("interrupted_ppo.py", tmp_path, [killed | {"kill_after": 6}], ranks)
    assert "going on from checkpoint" in said
    assert_alike(tmp_path / "whole", tmp_path / "killed", exactly=True)
