"""Finish many runs on two ranks on a loaded machine and count how their processes end: all must end with 0.

python benchmarks/clean_exit.py --runs 300 --jobs 2 --load 2
Each run is one optimiser step of step 1 on a tiny model, by turns at ZeRO 2 and 3 and under torchrun and the
deepspeed launcher. Most of the time of such a run goes into imports: the ranks that a launcher starts import
everything once and fork for each of `--forks` runs, so that what ends is a process of its own each time.
`--amplify` keeps the thread that watches over the peers inside a call of the process group's store: what a
slow machine does to a run of hundreds then happens in each.
"""

import argparse
import json
import os
import random
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "step1_sft/main.py"
FLAGS = (
    "--max_seq_len=32 --per_device_train_batch_size=8 --num_train_epochs=1 --eval_fraction=0 "
    "--data_split=1,0,0 --dtype=fp32 --enable_tensorboard=false"
)
KINDS = [(launcher, stage) for launcher in ("torchrun", "deepspeed") for stage in (2, 3)]
TIMEOUT = 900
SIGNS = re.compile(r"terminate called|Fatal Python error|Segmentation fault")
"""What the console shows of a process that did not end by itself."""


def main() -> int:
    """Run them all. The exit code is 1 where one did not end with 0."""
    args = parse()
    prepare(args.output_dir)
    with busy(args.load), ThreadPoolExecutor(args.jobs) as pool:
        starts = pool.map(lambda number: start(number, args), range(-(-args.runs // args.forks)))
        results = [result for results in starts for result in results]
    for launcher, stage in KINDS:
        mine = [result for result in results if result["kind"] == [launcher, stage]]
        ends = Counter(str(code) for result in mine for code in result["ranks ended with"])
        codes = ", ".join(f"{number} ranks ended with {code}" for code, number in sorted(ends.items()))
        print(f"{launcher}, ZeRO {stage}: {len(mine)} runs, {codes}")
    aborted = sum(result["aborted"] for result in results)
    amiss = sum(result["amiss"] for result in results)
    print(f"{len(results)} runs: {aborted} aborted, {amiss - aborted} went wrong in another way")
    (args.output_dir / "clean_exit.json").write_text(json.dumps(results, indent=2) + "\n")
    return int(amiss > 0)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--runs", type=int, default=300, help="Runs, dealt to stages and launchers in turn (default 300).")
    add("--jobs", type=int, default=2, help="Launchers at one time (default 2).")
    add("--load", type=int, default=0, help="Processes that keep the machine busy meanwhile (default 0).")
    add("--forks", type=int, default=5, help="Runs a launcher, one after the other (default 5).")
    add("--amplify", action="store_true", help="Keep the watch inside the store.")
    add("--output-dir", type=Path, default=Path("output/clean_exit"), help="Folder of all runs.")
    return parser.parse_args()


def prepare(folder: Path) -> None:
    """Sixteen rows and a tiny model."""
    if not (folder / "demo").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sizes = ["--num-train", "16", "--num-test", "0"]
        subprocess.run([sys.executable, ROOT / "scripts/demo_task.py", folder / "demo", *sizes], check=True)


@contextmanager
def busy(number: int) -> Iterator[None]:
    """So many processes that compute and nothing else, inside the block."""
    processes = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def start(number: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Start a launcher, wait for its end, and say what became of each of its runs.

    The console is kept where something went wrong.
    """
    launcher, stage = KINDS[number % len(KINDS)]
    folder, log = args.output_dir / f"start_{number:04d}", args.output_dir / f"start_{number:04d}.log"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    models, data = args.output_dir / "demo/base_model", args.output_dir / "demo/data/train.jsonl"
    flags = [*FLAGS.split(), f"--zero_stage={stage}", f"--model_name_or_path={models}"]
    flags += [f"--data_path={data}", f"--data_output_path={args.output_dir / 'cache'}"]
    ports = free_ports(args.forks)
    child = [str(Path(__file__).resolve()), "--child", json.dumps([str(folder), ports, args.amplify])]
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": os.pathsep.join(paths)}
    begin = time.monotonic()
    with log.open("wb") as console:
        code = subprocess.run(
            [*launched(launcher, ports[0]), *child, *flags],
            stdout=console, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
            timeout=TIMEOUT, check=False,
        ).returncode  # fmt: skip
    seconds = (time.monotonic() - begin) / args.forks
    results = [outcome(folder, fork) for fork in range(args.forks)]
    results = [{"kind": [launcher, stage], "seconds": round(seconds, 1), **result} for result in results]
    text = log.read_text(errors="replace")
    results[-1]["amiss"] |= code != 0 or SIGNS.search(text) is not None
    print(json.dumps({"start": number, "kind": f"{launcher}, ZeRO {stage}", "exit code": code,
                      "amiss": sum(r["amiss"] for r in results), "seconds a run": round(seconds, 1)}),
          flush=True)  # fmt: skip
    shutil.rmtree(folder)
    if any(result["amiss"] for result in results):
        print(text[-3000:], flush=True)
    else:
        log.unlink()
    return results


def outcome(folder: Path, fork: int) -> dict[str, Any]:
    """How the two ranks of a run ended: a negative number is the signal that did it."""
    files = [folder / f"{fork}.{rank}" for rank in range(2)]
    codes = [int(file.read_text()) if file.is_file() else None for file in files]
    aborted = any(code is not None and code < 0 for code in codes)
    finished = (folder / f"run_{fork}" / "summary.json").is_file()
    amiss = codes != [0, 0] or not finished
    return {"ranks ended with": codes, "aborted": aborted, "finished": finished, "amiss": amiss}


def launched(launcher: str, port: int) -> list[str]:
    """How two ranks of this Python are started."""
    if launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=2", f"--master_port={port}"]


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]


def child(folder: Path, ports: list[int], amplified: bool, flags: list[str]) -> int:
    """A rank of one run after the other, each in a fork of this process; returns the first bad code."""
    sys.path.insert(0, str(ROOT))
    runpy.run_path(str(PROGRAM))  # imports what it needs, and does nothing more under this name
    if amplified:
        linger_in_store()
    codes = []
    for fork, port in enumerate(ports):
        pid = os.fork()
        if pid == 0:
            if "TORCHELASTIC_RUN_ID" in os.environ:  # each run is an attempt of torchrun's, in its store
                os.environ["TORCHELASTIC_RESTART_COUNT"] = str(fork)
            else:
                os.environ["MASTER_PORT"] = str(port)
            sys.argv = [str(PROGRAM), *flags, f"--output_dir={folder / f'run_{fork}'}"]
            runpy.run_path(sys.argv[0], run_name="__main__")
            return 0
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        (folder / f"{fork}.{os.environ['RANK']}").write_text(str(codes[-1]))
    return next((abs(code) for code in codes if code), 0)


def linger_in_store() -> None:
    """Let each look of the watch wait in the store for a key that nobody sets, up to two seconds."""
    from dschat.distributed import restart, watchdog
    from dschat.distributed.process_wide import process_wide

    obey, watchdog.INTERVAL = restart.obey, 0.0

    def linger() -> None:
        obey()
        store = process_wide(restart.Orders).store
        with suppress(RuntimeError):  # the time has passed
            if store is not None:
                store.wait(["never"], timedelta(seconds=random.uniform(0.1, 2.0)))

    restart.obey = linger


if __name__ == "__main__":
    if "--child" in sys.argv:  # the deepspeed launcher puts --local_rank first
        place = sys.argv.index("--child")
        output, free, is_amplified = json.loads(sys.argv[place + 1])
        sys.exit(child(Path(output), free, is_amplified, sys.argv[1:place] + sys.argv[place + 2 :]))
    else:
        sys.exit(main())
