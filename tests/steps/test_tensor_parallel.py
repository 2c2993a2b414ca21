"""Runs whose layers two ranks share, of every step: like one process, and like themselves after a failure."""

import json
from pathlib import Path

import pytest
from alike_runs import COMPARED, EPSILON, assert_alike
from processes import ROOT, python
from test_ppo_resume import HALF_A_RANK, STEERED, flags_of, save_models_and_pairs
from tiny import save_counting_pairs, save_tiny_model

pytestmark = pytest.mark.matrix

WORKERS = ROOT / "tests" / "workers"
SHARED = "--tensor_parallel_size=2"
SUPERVISED = {
    "sft 0": ("sft", "llama", "--zero_stage=0"),
    "sft 1": ("sft", "opt", "--zero_stage=1", "--gradient_accumulation_steps=2"),
    "sft 2 adapters": ("sft", "gpt_neox", "--zero_stage=2", "--lora_dim=4"),
    "sft 1 packed": ("sft", "llama", "--zero_stage=1", "--packing=on"),
    "sft 3 recomputed": ("sft", "qwen3", "--zero_stage=3", "--gradient_checkpointing"),
    "reward 0": ("reward", "opt", "--zero_stage=0"),
    "reward 1 adapters": ("reward", "llama", "--zero_stage=1", "--lora_dim=4", "--only_optimize_lora"),
    "reward 2 offloaded": ("reward", "qwen3", "--zero_stage=2", "--offload"),
    "reward 3": ("reward", "llama", "--zero_stage=3"),
    "dpo 0 adapters": ("dpo", "qwen3", "--zero_stage=0", "--lora_dim=4", "--only_optimize_lora"),
    "dpo 1": ("dpo", "llama", "--zero_stage=1"),
    "dpo 3 packed": ("dpo", "qwen3", "--zero_stage=3", "--packing=on"),
    "dpo 2": ("dpo", "gpt_neox", "--zero_stage=2"),
    "dpo 3": ("dpo", "opt", "--zero_stage=3"),
}
ACTOR, CRITIC = {"actor_tensor_parallel_size": 2}, {"critic_tensor_parallel_size": 2}
HYBRID = {"enable_hybrid_engine": True}
RECOMPUTED = {"actor_gradient_checkpointing": True, "critic_gradient_checkpointing": True, "offload": True}
RECOMPUTED |= {"actor_zero_stage": 2, "critic_zero_stage": 3}
PPO = {
    "average": (STEERED, ACTOR | CRITIC),
    "average 3": ({"actor_zero_stage": 3, "critic_zero_stage": 3, **STEERED}, ACTOR | CRITIC),
    "recomputed, offloaded": (STEERED | RECOMPUTED, ACTOR | CRITIC),
    "packed": (STEERED | {"packing": "on", "actor_zero_stage": 3}, ACTOR | CRITIC),
    "adapters": ({"actor_lora_dim": 4, "critic_lora_dim": 4, "only_optimize_lora": True}, ACTOR | CRITIC),
    "actor alone": ({"actor_zero_stage": 1, "critic_zero_stage": 2}, ACTOR),
    "critic alone": ({"actor_zero_stage": 3, "enable_ema": True}, CRITIC),
    "generate()": ({"rollout_backend": "hf", "actor_zero_stage": 2}, ACTOR | CRITIC),
    "hybrid": (STEERED, ACTOR | CRITIC | HYBRID),
    "hybrid 3": ({"actor_zero_stage": 3, "critic_zero_stage": 3}, ACTOR | HYBRID),
    "hybrid adapters": ({"actor_lora_dim": 4, "only_optimize_lora": True}, ACTOR | HYBRID),
}


def supervised(folder: Path, name: str, output: str, *more: str, data_ranks: int = 1) -> dict:
    program, family, *flags = SUPERVISED[name]
    if not (folder / family).exists():
        save_tiny_model(folder / family, family)
    rows = 8 // data_ranks // (2 if "--gradient_accumulation_steps=2" in flags else 1)
    paths = {
        "model_name_or_path": folder / family,
        "data_path": folder / "pairs.jsonl",
        "data_output_path": folder / f"cache {output}",
        "output_dir": folder / output / name,
    }
    own = [
        *(f"--{flag}={path}" for flag, path in paths.items()),
        *(f"--per_device_train_batch_size={rows}", "--learning_rate=3e-3", f"--adam_epsilon={EPSILON}"),
        *("--num_train_epochs=2", "--data_split=1,1,1", "--save_interval=2", "--dtype=fp32"),
        *("--packing=off", "--pad_to_multiple_of=8"),
    ]
    return {"program": program, "flags": [*own, *flags, *more]}


def start(worker: str, folder: Path, name: str, runs: list[dict], ranks: int) -> None:
    (folder / f"{name}.json").write_text(json.dumps(runs))
    python(WORKERS / worker, folder / f"{name}.json", ranks=ranks, timeout=1500)


@pytest.mark.parametrize("ranks", [2, 4])
def test_steps_1_and_2_and_dpo(tmp_path, ranks):
    save_counting_pairs(tmp_path / "pairs.jsonl")
    whole = [supervised(tmp_path, name, "whole") for name in SUPERVISED]
    start("interrupted_runs.py", tmp_path, "whole", whole, 1)
    shared: list[dict] = []
    for name in SUPERVISED:
        shared.append(supervised(tmp_path, name, "shared", SHARED, data_ranks=ranks // 2))
        failing = supervised(tmp_path, name, "resumed", SHARED, data_ranks=ranks // 2)
        again = [*failing["flags"], "--resume_from_checkpoint=latest"]
        shared += [{**failing, "die_in": 4}, {**failing, "flags": again}]
    start("interrupted_runs.py", tmp_path, "shared", shared, ranks)
    for name in SUPERVISED:
        assert_alike(tmp_path / "whole" / name, tmp_path / "shared" / name, exactly=False)
        assert_alike(tmp_path / "shared" / name, tmp_path / "resumed" / name, exactly=True)


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2)])
def test_a_run_goes_on_with_another_number_of_data_ranks(before, after, tmp_path):
    save_counting_pairs(tmp_path / "pairs.jsonl")
    start("interrupted_runs.py", tmp_path, "whole", [supervised(tmp_path, n, "whole") for n in SUPERVISED], 1)
    cut, again = (
        [supervised(tmp_path, name, "moved", SHARED, *more, data_ranks=ranks // 2) for name in SUPERVISED]
        for ranks, *more in ((before,), (after, "--resume_from_checkpoint=latest"))
    )
    start("interrupted_runs.py", tmp_path, "cut", [{**run, "die_in": 4} for run in cut], before)
    start("interrupted_runs.py", tmp_path, "again", again, after)
    for name in SUPERVISED:
        assert_alike(tmp_path / "whole" / name, tmp_path / "moved" / name, exactly=False)


@pytest.mark.parametrize("ranks", [2, 4])
def test_step_3(tmp_path, ranks):
    save_models_and_pairs(tmp_path)
    shape = COMPARED | (HALF_A_RANK if ranks == 4 else {})
    whole, shared = [], []
    for name, (options, sizes) in PPO.items():
        alone = options | COMPARED
        whole.append({"flags": flags_of(tmp_path, f"whole/{name}", alone)})
        shared.append({"flags": flags_of(tmp_path, f"shared/{name}", shape | options | sizes)})
        stopped = flags_of(tmp_path, f"resumed/{name}", shape | options | sizes)
        shared.append({"flags": stopped, "stop_after": 5})
        shared.append({"flags": [*stopped, "--resume_from_checkpoint=latest"]})
    start("interrupted_ppo.py", tmp_path, "whole", whole, 1)
    start("interrupted_ppo.py", tmp_path, "shared", shared, ranks)
    for name in PPO:
        assert_alike(tmp_path / "whole" / name, tmp_path / "shared" / name, exactly=False)
        assert_alike(tmp_path / "shared" / name, tmp_path / "resumed" / name, exactly=True)
