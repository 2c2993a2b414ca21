"""Let step 3 run for half an hour on a tiny model and watch each rank's memory and open files.

python benchmarks/soak.py --minutes 30 --ranks 2
The run is ended by SIGTERM, so its last checkpoint is looked at as well. OUTPUT/soak.json has every sample.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
FLAGS = (
    "--data_split=1,1,1 --max_prompt_seq_len=40 --max_answer_seq_len=16 "
    "--num_train_epochs=100000 --per_device_generation_batch_size=8 --per_device_training_batch_size=8 "
    "--ppo_epochs=2 --kl_target=0.5 --score_normalization=running --enable_ema "
    "--eval_interval=20 --save_interval=10 --save_total_limit=2 "
    "--actor_learning_rate=1e-6 --critic_learning_rate=1e-6"
)
WARM_UP = 0.2
"""Share of the time before which growth does not count."""


def main() -> int:
    """Run, sample, report. Returns the exit code: 1 where something grows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--minutes", type=float, default=30, help="Length of the run (default 30).")
    add("--ranks", type=int, default=2, help="Processes (default 2).")
    add("--zero", type=int, default=2, choices=range(4), help="ZeRO stage of actor and critic (default 2).")
    add("--dtype", default="bf16", choices=("bf16", "fp32"), help="Precision of the models (default bf16).")
    add("--interval", type=float, default=5, help="Seconds between samples (default 5).")
    add("--models", type=Path, default=Path("output/faults"), help="What benchmarks/faults.py prepared.")
    add("--output-dir", type=Path, default=Path("output/soak"), help="Folder of the run.")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import faults

    faults.prepare(args.models)
    shutil.rmtree(args.output_dir, ignore_errors=True)
    args.output_dir.mkdir(parents=True)
    process = start(args)
    samples = watch(process, args)
    code = end(process)
    (args.output_dir / "soak.json").write_text(json.dumps(samples) + "\n")
    steps = len((args.output_dir / "run" / "metrics.jsonl").read_text().splitlines())
    print(f"{steps} lines of metrics; torchrun, whose ranks got SIGTERM, ended with {code}")
    return report(samples)


def start(args: argparse.Namespace) -> subprocess.Popen:
    """The run under torchrun, in a group of processes of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    flags = [
        f"--actor_model_name_or_path={args.models / 'sft'}",
        f"--critic_model_name_or_path={args.models / 'reward'}",
        f"--data_path={args.models / 'demo' / 'data'}",
        f"--data_output_path={args.models / 'cache'}",
        f"--output_dir={args.output_dir / 'run'}",
        f"--actor_zero_stage={args.zero}",
        f"--critic_zero_stage={args.zero}",
        f"--dtype={args.dtype}",
        *FLAGS.split(),
    ]
    with (args.output_dir / "training.log").open("wb") as log:
        return subprocess.Popen(
            [*launcher, f"--nproc_per_node={args.ranks}", str(ROOT / "step3_ppo" / "main.py"), *flags],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,
        )


def watch(process: subprocess.Popen, args: argparse.Namespace) -> list[dict]:
    """Resident memory in MiB and open files of each rank, every few seconds."""
    samples, begin = [], time.monotonic()
    while (seconds := time.monotonic() - begin) < args.minutes * 60:
        if process.poll() is not None:
            sys.exit(f"the run ended by itself with {process.returncode}; see {args.output_dir}/training.log")
        for number, rank in enumerate(sorted(psutil.Process(process.pid).children(), key=lambda p: p.pid)):
            memory, files = rank.memory_info().rss / 2**20, rank.num_fds()
            samples.append({"seconds": seconds, "rank": number, "memory_mib": memory, "open_files": files})
        time.sleep(args.interval)
    return samples


def end(process: subprocess.Popen) -> int:
    """Ask the run to end; its exit code."""
    for rank in psutil.Process(process.pid).children():
        rank.send_signal(signal.SIGTERM)
    return process.wait(timeout=300)


def report(samples: list[dict]) -> int:
    """Compare the first and the last tenth of the time after the warm-up; returns the exit code."""
    length, grows = samples[-1]["seconds"], False
    for rank in sorted({sample["rank"] for sample in samples}):
        own = [s for s in samples if s["rank"] == rank and s["seconds"] >= WARM_UP * length]
        tenth = max(1, len(own) // 10)
        for name in ("memory_mib", "open_files"):
            first, last = (sum(s[name] for s in part) / len(part) for part in (own[:tenth], own[-tenth:]))
            growth = last / first - 1
            grows |= growth > 0.02
            print(f"rank {rank} {name}: {first:.1f} -> {last:.1f} ({growth:+.2%}) after the warm-up")
    return int(grows)


if __name__ == "__main__":
    sys.exit(main())
