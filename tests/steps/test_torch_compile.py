"""--torch_compile with torch's compiler, Inductor: every step, shared layers and rows, each resumed once.

tests/models/test_compiled_layers.py has what is compiled and how often, with a stand-in for the compiler.
"""

import json
from pathlib import Path

import pytest
from alike_runs import COMPARED, EPSILON, assert_alike
from processes import ROOT, python
from test_ppo_resume import flags_of, save_models_and_pairs
from tiny import save_counting_pairs, save_tiny_model

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(7200)]

COMPILED = "--torch_compile"
CASES = {
    "sft": ("sft", "llama", 1),
    "reward": ("reward", "opt", 1),
    "dpo": ("dpo", "qwen3", 1),
    "shared layers": ("sft", "llama", 2, "--tensor_parallel_size=2", "--zero_stage=1"),
    "shared rows": ("reward", "opt", 2, "--sequence_parallel_size=2", "--zero_stage=2"),
}
"""Step, family, ranks and further flags of the compiled runs."""


def run(worker: str, folder: Path, runs: list[dict], ranks: int = 1) -> None:
    (folder / "runs.json").write_text(json.dumps(runs))
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder.parent / "inductor")}
    python(ROOT / "tests" / "workers" / worker, folder / "runs.json", ranks=ranks, timeout=3600, env=caches)


@pytest.mark.parametrize("case", CASES)
def test_steps_1_and_2_and_dpo(case, tmp_path):
    step, family, ranks, *more = CASES[case]
    save_counting_pairs(tmp_path / "pairs.jsonl")
    save_tiny_model(tmp_path / family, family)

    def of(name: str, *flags: str, **fate: int) -> dict:
        paths = {
            "model_name_or_path": family,
            "data_path": "pairs.jsonl",
            "data_output_path": f"cache{ranks}",
        }
        common = [f"--{flag}={tmp_path / path}" for flag, path in (paths | {"output_dir": name}).items()]
        common += ["--per_device_train_batch_size=8", "--learning_rate=1e-3", f"--adam_epsilon={EPSILON}"]
        common += ["--num_train_epochs=1", "--data_split=1,1,1", "--save_interval=2", "--dtype=fp32"]
        common += ["--packing=off", "--pad_to_multiple_of=8", "--preprocessing_num_workers=1"]
        return {"program": step, "flags": [*common, *flags], **fate}

    run("interrupted_runs.py", tmp_path, [of("plain")])
    stopped = of("stopped", COMPILED, *more)
    again = {**stopped, "flags": [*stopped["flags"], "--resume_from_checkpoint=latest"]}
    runs = [of("compiled", COMPILED, *more), {**stopped, "die_in": 3}, again]
    run("interrupted_runs.py", tmp_path, runs, ranks)
    assert_alike(tmp_path / "plain", tmp_path / "compiled", exactly=False)
    assert_alike(tmp_path / "compiled", tmp_path / "stopped", exactly=True)


def test_step_3(tmp_path):
    save_models_and_pairs(tmp_path)
    names = ("plain", "compiled", "stopped")
    plain, compiled, stopped = (flags_of(tmp_path, name, COMPARED) for name in names)
    runs = [{"flags": plain}, {"flags": [*compiled, COMPILED]}]
    runs.append({"flags": [*stopped, COMPILED], "stop_after": 5})
    runs.append({"flags": [*stopped, COMPILED, "--resume_from_checkpoint=latest"]})
    run("interrupted_ppo.py", tmp_path, runs)
    assert_alike(tmp_path / "plain", tmp_path / "compiled", exactly=False)
    assert_alike(tmp_path / "compiled", tmp_path / "stopped", exactly=True)
