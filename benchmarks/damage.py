"""Spoil checkpoints and disks in every way a user may meet, and print what a run says of each.

python benchmarks/damage.py
Every trial is a whole program on the models that benchmarks/faults.py prepares. The exit code is 1 where one
ends with another code than it should, shows a traceback, or does not name what was spoilt. The disks are
small tmpfs mounts, which root alone may make; others are told that these trials were left out.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import faults

from dschat.console.streams import take_over
from dschat.errors import EXIT_TRY_AGAIN
from dschat.runs.atomic_folder import names_of_files

CASE = {case.name: case for case in faults.CASES}
ONE_RANK, TWO_RANKS = CASE["ppo zero 0 fp32"], CASE["sft zero 2 bf16 LoRA"]
SMALL = CASE["sft zero 0 fp32"]

SAYS = ("error:", "WARNING: checkpoint", "WARNING: no checkpoint", "WARNING: PPO step", "going on from")


class Trials:
    """Runs trials and remembers whether one went wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.num_wrong, self.number = folder, 0, 0

    def run(
        self, what: str, case: faults.Case, output: Path, *more: str, code: int, names: tuple[str, ...]
    ) -> None:
        """Run the case in `output`; it must end with `code`, or not with 0, and say all of `names`."""
        output.with_suffix(".log").unlink(missing_ok=True)
        found, log = faults.finish(faults.start_run(case, output, self.folder, *more), output)
        lines = log.replace("\r", "\n").splitlines()
        said = list(dict.fromkeys(line.strip() for line in lines if line.startswith(SAYS)))
        self.number += 1
        is_code = found == code or (case.ranks > 1 and code != 0 != found)  # torchrun has codes of its own
        missing = [name for name in names if not any(name in line for line in said)]
        own_traceback = case.ranks == 1 and "Traceback" in log
        is_wrong = not is_code or missing or own_traceback
        self.num_wrong += bool(is_wrong)
        print(f"\n{self.number}. {what} -> exit code {found}{' WRONG' if is_wrong else ''}", flush=True)
        for line in dict.fromkeys([*said[:2], *said[-1:]]):
            print(f"    {line.replace(str(self.folder), 'OUTPUT')}", flush=True)
        if is_wrong:
            print(f"    not said: {missing}\n{log[-2000:]}", flush=True)


def main() -> int:
    """All trials. Returns the exit code."""
    take_over()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output-dir", type=Path, default=Path("output/damage"), help="Folder of all runs.")
    folder = parser.parse_args().output_dir.absolute()
    faults.prepare(folder)
    trials = Trials(folder)
    spoil_files(trials, stopped(ONE_RANK, folder))
    spoil_ranks(trials, stopped(TWO_RANKS, folder))
    swap_models(trials, stopped(SMALL, folder))
    spoil_disks(trials)
    print(f"\n{trials.number} trials, {trials.num_wrong} went wrong")
    return int(trials.num_wrong > 0)


def stopped(case: faults.Case, folder: Path) -> Path:
    """A run of the case that was stopped with two checkpoints behind it."""
    output = folder / case.name.replace(" ", "_")
    shutil.rmtree(output, ignore_errors=True)
    process = faults.start_run(case, output, folder)
    while len(list(output.glob("checkpoints/step_*/complete.json"))) < 2:
        assert process.poll() is None, f"{case.name} ended early: {output.with_suffix('.log')}"
        time.sleep(0.01)
    process.terminate()
    assert process.wait(timeout=120) in (EXIT_TRY_AGAIN, 1)
    return output


def checkpoints(output: Path) -> list[Path]:
    """The newest first."""
    return sorted(output.glob("checkpoints/step_*"), reverse=True)


@contextmanager
def kept(*paths: Path) -> Iterator[None]:
    """Put the files and folders back afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        copies = [(path, Path(folder, str(number))) for number, path in enumerate(paths)]
        for path, copy in copies:
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, copy)
        try:
            yield
        finally:
            for path, copy in copies:
                if path.is_dir():
                    shutil.rmtree(path)
                shutil.move(copy, path)


def flip(path: Path) -> None:
    """Change one bit in the middle of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def spoil_files(trials: Trials, output: Path) -> None:
    """Each file of a checkpoint with one flipped bit, and a few other ways to spoil one."""
    newest, before = checkpoints(output)[:2]
    for name in [*names_of_files(newest), "complete.json"]:
        with kept(newest / name):
            flip(newest / name)
            flag = f"--resume_from_checkpoint={newest}"
            trials.run(f"a flipped bit in {name}", ONE_RANK, output, flag, code=2, names=("error:", name))
    largest = max(newest.rglob("*.pt"), key=lambda path: path.stat().st_size)
    latest = "--resume_from_checkpoint=latest"
    with kept(newest, before):
        os.truncate(largest, largest.stat().st_size // 2)
        flip(before / "progress.json")
        names = (f"{newest.name} is passed over", f"{before.name} is passed over", "no checkpoint in")
        trials.run("latest, and none is intact", ONE_RANK, output, latest, code=2, names=names)
    with kept(output):
        os.truncate(largest, largest.stat().st_size // 2)
        names = (f"{newest.name} is passed over", "bytes instead of", f"going on from checkpoint {before}")
        trials.run("a truncated file, latest", ONE_RANK, output, latest, code=0, names=names)
    missing = output / "checkpoints" / "step_99999999"
    flag = f"--resume_from_checkpoint={missing}"
    trials.run("a folder that is not there", ONE_RANK, output, flag, code=2, names=("no such folder",))


def spoil_ranks(trials: Trials, output: Path) -> None:
    """A file of one of two ranks is gone."""
    newest = checkpoints(output)[0]
    for path in (newest / "rank_00001.safetensors", *sorted(newest.rglob("*rank_1_*"))):
        with kept(path):
            path.unlink()
            flag = f"--resume_from_checkpoint={newest}"
            names = ("error:", f"{path.relative_to(newest)} is missing")
            trials.run(f"{path.relative_to(newest)} is gone", TWO_RANKS, output, flag, code=2, names=names)


def swap_models(trials: Trials, output: Path) -> None:
    """A checkpoint of another model, by path, by content, and of another program."""
    flag = f"--resume_from_checkpoint={checkpoints(output)[0]}"
    other = f"--model_name_or_path={trials.folder / 'sft'}"
    names = ("--model_name_or_path names another model",)
    trials.run("a checkpoint of another model", SMALL, output, flag, other, code=2, names=names)
    weights = trials.folder / "demo" / "base_model" / "model.safetensors"
    with kept(weights):
        flip(weights)
        trials.run("the model in its folder has changed", SMALL, output, flag, code=2, names=names)
    dpo = CASE["dpo zero 1 bf16"]
    names = ("its program is 'sft' and this one's is 'dpo'",)
    trials.run("a checkpoint of another program", dpo, trials.folder / "dpo", flag, code=2, names=names)
    names = ("--learning_rate is 0.5 and was 0.001",)
    trials.run("another flag", SMALL, output, flag, "--learning_rate=0.5", code=2, names=names)


@contextmanager
def disk(folder: Path, mib: int) -> Iterator[Path]:
    """A disk of that size."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def spoil_disks(trials: Trials) -> None:
    """Disks with too little room, and one that cannot be written. A checkpoint of this run takes 12 MiB."""
    if os.geteuid() != 0:
        print("\ntrials with disks are left out: they take root's right to mount")
        return
    place, output = trials.folder / "disk", trials.folder / "console"  # the console needs room, too
    there = f"--output_dir={place / 'run'}"
    with disk(place, 20):
        names: tuple[str, ...] = ("No space left on device", "is kept")
        trials.run("room for one checkpoint and the model", SMALL, output, there, code=0, names=names)
    with disk(place, 14):
        names = ("WARNING: no checkpoint", "error: the model could not be written", "No space left on device")
        trials.run("no room for the model", SMALL, output, there, code=2, names=names)
        subprocess.run(["mount", "-o", "remount,size=40m", str(place)], check=True)
        names = (f"going on from checkpoint {place}",)
        latest = "--resume_from_checkpoint=latest"
        trials.run("and then there is", SMALL, output, there, latest, code=0, names=names)
    with disk(place, 40):
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        names = ("--output_dir", "cannot be written (Read-only file system)")
        trials.run("a read-only folder", SMALL, output, there, code=2, names=names)


if __name__ == "__main__":
    sys.exit(main())
