"""Whether two checkouts compute the same, bit by bit: small seeded runs of each in fp32, and their files.

    python benchmarks/same_numbers.py BEFORE AFTER [--work FOLDER]

Runs in both checkouts, each with its own code and this Python's environment: the demo task's data and model,
two ranks of step 1 at ZeRO-3, step 2, DPO, and six PPO steps on one rank and on two at ZeRO-3. Compares all
weights and every line of metrics.jsonl without seconds, rates and memory. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS = {
    "sft": ("step1_sft/main.py", 2),
    "reward": ("step2_reward/main.py", 1),
    "dpo": ("step2_reward/dpo.py", 1),
    "ppo": ("step3_ppo/main.py", 1),
    "ppo_on_two_ranks": ("step3_ppo/main.py", 2),
}
"""Each run's program and its number of ranks."""

TRAINED = "--per_device_train_batch_size 8 --max_seq_len 64 --num_train_epochs 0.05"
PPO = (
    "--actor_model_name_or_path {out}/sft --critic_model_name_or_path {out}/reward --max_prompt_seq_len 40 "
    "--max_answer_seq_len 20 --enable_ema --eval_interval 3 --num_eval_prompts 32 --save_interval 4"
)
FLAGS = {
    "sft": f"--model_name_or_path {{out}}/base_model {TRAINED} --zero_stage 3 --data_split 4,2,4",
    "reward": f"--model_name_or_path {{out}}/sft {TRAINED} --data_split 4,2,4",
    "dpo": f"--model_name_or_path {{out}}/sft {TRAINED} --data_split 4,2,4 --lora_dim 4 --only_optimize_lora",
    "ppo": f"{PPO} --per_device_generation_batch_size 32 --per_device_training_batch_size 16 "
    "--num_train_epochs 0.48 --ppo_epochs 2 --data_split 4,2,4",
    "ppo_on_two_ranks": f"{PPO} --per_device_generation_batch_size 16 --per_device_training_batch_size 8 "
    "--num_train_epochs 0.48 --actor_zero_stage 3 --critic_zero_stage 3 --data_split 4,2,4",
}
UNEQUAL = ("seconds", "per_second", "peak_share", "memory")
"""Parts of the names of metrics that no two runs have in common."""


def run(checkout: Path, out: Path) -> None:
    """All runs of a checkout, below `out`."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    demo = [sys.executable, "scripts/demo_task.py", str(out), "--num-train", "1000", "--num-test", "100"]
    _call(demo, checkout, environment, out / "demo.txt")
    for name, (program, ranks) in STEPS.items():
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command = [sys.executable, *(launcher if ranks > 1 else []), program]
        flags = FLAGS[name].format(out=out).split()
        shared = f"--data_path {out}/data --dtype fp32 --output_dir {out}/{name} --seed 7".split()
        _call([*command, *flags, *shared], checkout, environment, out / f"{name}.txt")
        print(f"{checkout}: {name} done", flush=True)


def _call(command: list[str], checkout: Path, environment: dict[str, str], log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        code = subprocess.run(
            command, cwd=checkout, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code != 0:
        sys.exit(f"{' '.join(command)} ended with {code}:\n{log.read_text()[-3000:]}")


def contents(out: Path) -> dict[str, str]:
    """A checksum of every file of weights, and of every file of metrics without what differs by nature."""
    found = {}
    for path in sorted(out.rglob("*.safetensors")):
        if not {"checkpoints", "base_model"} & set(path.relative_to(out).parts):
            found[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(out.rglob("metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [{k: v for k, v in line.items() if not any(part in k for part in UNEQUAL)} for line in lines]
        found[str(path.relative_to(out))] = hashlib.sha256(json.dumps(kept).encode()).hexdigest()
    return found


def main() -> None:
    """Run, compare, say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="A checkout, or the results of one from an earlier call.")
    parser.add_argument("after", type=Path, help="Another.")
    parser.add_argument("--work", type=Path, help="Where the results go (default: a temporary folder).")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp())
    found = []
    for name in ("before", "after"):
        checkout = getattr(args, name).resolve()
        if (checkout / "dschat").is_dir():
            # One place for both: its path is part of what a run writes.
            place, results = work / "run", work / name
            for old in (place, results):
                shutil.rmtree(old, ignore_errors=True)
            run(checkout, place)
            place.rename(results)
            checkout = results
        found.append(contents(checkout))
    before, after = found
    different = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    for name in sorted(before.keys() | after.keys()):
        print(f"{'DIFFERENT' if name in different else 'equal'}  {name}")
    print(f"{len(before)} files, {len(different)} different")
    sys.exit(bool(different) or not before)


if __name__ == "__main__":
    main()
