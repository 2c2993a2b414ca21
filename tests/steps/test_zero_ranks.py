"""Ranks of data at every ZeRO stage, with offloading, adapters, recomputation and the moving average.

Each run is compared with one process, and with itself after a failure.
"""

import json
from pathlib import Path

import pytest
from alike_runs import COMPARED, EPSILON, assert_alike
from processes import ROOT, python
from test_ppo_resume import HALF_A_RANK, STEERED, flags_of, save_models_and_pairs
from tiny import save_counting_pairs, save_tiny_model

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(3600)]

WORKERS = ROOT / "tests" / "workers"
LORA, RECOMPUTED = ("--lora_dim=4", "--lora_learning_rate=3e-3"), "--gradient_checkpointing"
KINDS = {
    "plain": (),
    "offloaded": ("--offload",),
    "adapters": LORA,
    "adapters alone": (*LORA, "--only_optimize_lora"),
    "recomputed": (RECOMPUTED,),
    "all": ("--offload", *LORA, RECOMPUTED),
}
FAMILIES = {"sft": "llama", "reward": "opt", "dpo": "qwen3"}

TRAINED = ("actor", "critic")
ADAPTERS = {f"{model}_lora_dim": 4 for model in TRAINED}
ADAPTERS |= {f"{model}_lora_learning_rate": 1e-2 for model in TRAINED}
PASSED_AGAIN = {f"{model}_gradient_checkpointing": True for model in TRAINED}
PPO_KINDS = {
    "average": {},
    "average, offloaded": {"offload": True},
    "average, adapters alone": ADAPTERS | {"only_optimize_lora": True},
    "average, recomputed": PASSED_AGAIN,
    "average and all": ADAPTERS | PASSED_AGAIN | {"offload": True},
}


def start(worker: str, file: Path, runs: list[dict], ranks: int = 1) -> None:
    file.write_text(json.dumps(runs))
    python(WORKERS / worker, file, ranks=ranks, timeout=3000)


def interrupted(run: dict, **fate: int) -> list[dict]:
    """A run that ends on the way, and its end."""
    return [{**run, **fate}, {**run, "flags": [*run["flags"], "--resume_from_checkpoint=latest"]}]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("step", FAMILIES)
def test_steps_1_and_2_and_dpo(step, ranks, tmp_path):
    save_counting_pairs(tmp_path / "pairs.jsonl")
    model = save_tiny_model(tmp_path / "model", FAMILIES[step])
    cases = {
        f"{kind} {stage}": (*flags, f"--zero_stage={stage}")
        for kind, flags in KINDS.items()
        for stage in range(4)
        if stage > 0 or "--offload" not in flags
    }

    def of(output: str, num_ranks: int, *flags: str) -> dict:
        paths = {"model_name_or_path": model, "data_path": tmp_path / "pairs.jsonl"}
        paths |= {"data_output_path": tmp_path / f"cache {num_ranks}", "output_dir": tmp_path / output}
        own = [f"--{flag}={path}" for flag, path in paths.items()]
        own += [f"--per_device_train_batch_size={8 // num_ranks}", "--learning_rate=3e-3", "--dtype=fp32"]
        own += [f"--adam_epsilon={EPSILON}", "--num_train_epochs=2", "--data_split=1,1,1"]
        own += ["--save_interval=2", "--packing=off", "--pad_to_multiple_of=8", "--no_enable_tensorboard"]
        return {"program": step, "flags": [*own, *flags]}

    kinds = {kind: [flag for flag in flags if flag != "--offload"] for kind, flags in KINDS.items()}
    start(
        "interrupted_runs.py", tmp_path / "one.json", [of(f"one/{kind}", 1, *kinds[kind]) for kind in kinds]
    )
    runs = []
    for case, flags in cases.items():
        runs.append(of(f"whole/{case}", ranks, *flags))
        runs += interrupted(of(f"resumed/{case}", ranks, *flags), die_in=4)
    start("interrupted_runs.py", tmp_path / "ranks.json", runs, ranks)
    for case in cases:
        assert_alike(tmp_path / "one" / case[:-2], tmp_path / "whole" / case, exactly=False)
        assert_alike(tmp_path / "whole" / case, tmp_path / "resumed" / case, exactly=True)


@pytest.mark.parametrize("kind", PPO_KINDS)
def test_step_3(kind, tmp_path):
    save_models_and_pairs(tmp_path)
    options = STEERED | COMPARED | PPO_KINDS[kind]
    alone = {name: value for name, value in options.items() if name != "offload"}
    start("interrupted_ppo.py", tmp_path / "one.json", [{"flags": flags_of(tmp_path, "one", alone)}])
    stages = [(stage, (stage + 1) % 4) for stage in range(4)]
    if "offload" in options:
        stages = [(1, 2), (2, 3), (3, 1)]
    runs = []
    for actor, critic in stages:
        sharded = options | HALF_A_RANK | {"actor_zero_stage": actor, "critic_zero_stage": critic}
        runs.append({"flags": flags_of(tmp_path, f"whole {actor}", sharded)})
        runs += interrupted({"flags": flags_of(tmp_path, f"resumed {actor}", sharded)}, stop_after=5)
    start("interrupted_ppo.py", tmp_path / "ranks.json", runs, 2)
    for actor, _ in stages:
        assert_alike(tmp_path / "one", tmp_path / f"whole {actor}", exactly=False)
        assert_alike(tmp_path / f"whole {actor}", tmp_path / f"resumed {actor}", exactly=True)
