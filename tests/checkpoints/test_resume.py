"""Runs that were stopped, failed or killed end like those that were not."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from figures import timeless_lines
from processes import ROOT, environment, python
from tiny import save_counting_pairs, save_tiny_model

WORKER = ROOT / "tests" / "workers" / "interrupted_runs.py"
SFT = ROOT / "step1_sft" / "main.py"

# Nineteen rows, eight a step: three steps an epoch, six in all; five in one epoch and a half.
ROUGH = ("--dropout=0.1", "--gradient_accumulation_steps=2", "--weight_decay=0.1")

CASES = {
    "fp32": ("sft", "--dtype=fp32", *ROUGH),
    "bf16": ("sft", "--dtype=bf16", "--zero_stage=2", *ROUGH),
    "bf16_lora": ("sft", "--dtype=bf16", "--lora_dim=4", "--lora_dropout=0.1", *ROUGH),
    "reward": ("reward", "--dtype=bf16", "--zero_stage=3", "--num_train_epochs=1.5", *ROUGH),
    "reward_fp32": ("reward", "--dtype=fp32", "--zero_stage=1", "--eval_interval=1", *ROUGH),
    "dpo": ("dpo", "--dtype=bf16", "--num_train_epochs=0.9", *ROUGH),
    "dpo_lora": ("dpo", "--dtype=fp32", "--zero_stage=2", "--lora_dim=4", "--only_optimize_lora", *ROUGH),
}
STOPS = {
    "fp32": [{"stop_after": 1}, {"stop_after": 3}, {"stop_after": 6}, {"die_in": 1}, {"die_in": 6}],
    "bf16": [{"stop_after": 2}],
    "bf16_lora": [{"die_in": 4}],
    "reward": [{"stop_after": 4}],
    "reward_fp32": [{"die_in": 5}],
    "dpo": [{"stop_after": 2}],
    "dpo_lora": [{"die_in": 5}],
}
ON_TWO_RANKS = {
    "bf16_stage3": ("sft", "--dtype=bf16", "--zero_stage=3", *ROUGH),
    "fp32_stage1": ("sft", "--dtype=fp32", "--zero_stage=1", *ROUGH),
}
STOPS_ON_TWO_RANKS = {
    "bf16_stage3": [{"stop_after": 2}],
    "fp32_stage1": [{"full_after": 4, "die_in": 5}],
}
RESHARDED = {f"stage{stage}": ("sft", "--dtype=fp32", f"--zero_stage={stage}") for stage in range(4)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model and sixty preferences."""
    folder = tmp_path_factory.mktemp("resume")
    save_counting_pairs(folder / "pairs.jsonl")
    save_tiny_model(folder / "base")
    return folder


def flags(folder: Path, output: str, *more: str, ranks: int = 1) -> list[str]:
    rows = 8 // ranks // (2 if "--gradient_accumulation_steps=2" in more else 1)
    return [
        f"--model_name_or_path={folder / 'base'}",
        f"--data_path={folder / 'pairs.jsonl'}",
        f"--data_output_path={folder / 'cache'}",
        f"--output_dir={folder / output}",
        f"--per_device_train_batch_size={rows}",
        *("--learning_rate=3e-3", "--num_train_epochs=2", "--data_split=1,1,1", "--save_interval=2", *more),
    ]


def run(folder: Path, runs: list[dict], *, ranks: int = 1, name: str = "runs") -> str:
    """What the runs print, all of them in one process a rank."""
    (folder / f"{name}.json").write_text(json.dumps(runs))
    return python(WORKER, folder / f"{name}.json", ranks=ranks).stdout


def output_of(case: str, stop: dict) -> str:
    return f"{case}_{'_'.join(f'{how}_{step}' for how, step in stop.items())}"


def interrupted(folder: Path, cases: dict, stops: dict, ranks: int) -> str:
    """Run each case whole, and stopped and resumed; what is printed."""
    runs = []
    for case, (program, *more) in cases.items():
        runs.append({"program": program, "flags": flags(folder, case, *more, ranks=ranks)})
        for stop in stops[case]:
            again = flags(folder, output_of(case, stop), *more, ranks=ranks)
            runs.append({"program": program, "flags": again, **stop})
            runs.append({"program": program, "flags": [*again, "--resume_from_checkpoint"]})
    return run(folder, runs, ranks=ranks, name=f"on_{ranks}")


@pytest.fixture(scope="module")
def one_rank(folder) -> str:
    return interrupted(folder, CASES, STOPS, 1)


@pytest.fixture(scope="module")
def two_ranks(folder) -> str:
    return interrupted(folder, ON_TWO_RANKS, STOPS_ON_TWO_RANKS, 2)


def pairs(stops: dict) -> list[tuple[str, dict]]:
    return [(case, stop) for case, some in stops.items() for stop in some]


def assert_same_end(folder: Path, case: str, stop: dict, told: str) -> None:
    """The weights and figures are those of the whole run bit by bit, and the run did go on in the middle."""
    output = output_of(case, stop)
    weights = ((folder / name / "model.safetensors").read_bytes() for name in (case, output))
    assert next(weights) == next(weights)
    assert timeless_lines(folder / output) == timeless_lines(folder / case)
    timeless = [json.loads((folder / name / "summary.json").read_text()) for name in (case, output)]
    assert [summary.pop("seconds") > 0 for summary in timeless] == [True, True]
    assert timeless[0] == timeless[1]
    step = stop.get("stop_after") or (stop["die_in"] - 1) // 2 * 2
    if "full_after" in stop:
        step -= 2
    went_on = f"going on from checkpoint {folder / output}/checkpoints/step_{step:08d}"
    assert (went_on in told) == (step > 0)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "stop"), pairs(STOPS), ids=str)
def test_an_interrupted_run_ends_bit_by_bit_like_a_whole_one(case, stop, folder, one_rank):
    assert_same_end(folder, case, stop, one_rank)


@pytest.mark.slow
def test_a_part_of_an_epoch_ends_with_an_evaluation_and_the_schedule_with_it(folder, one_rank):
    lines = [json.loads(line) for line in (folder / "reward" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3, 5]
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert len(rates) == 5
    # The cosine from 3e-3 to 0 over five steps, each logged after its step.
    assert rates == pytest.approx([3e-3 * (1 + math.cos(math.pi * step / 5)) / 2 for step in range(1, 6)])
    assert json.loads((folder / "reward" / "summary.json").read_text())["eval_loss"] == lines[-1]["eval_loss"]
    assert "epoch 1.5: eval_loss" in one_rank
    assert "epoch 0.9: " in one_rank  # DPO: three steps, the last of them with the rows of a whole epoch


@pytest.mark.slow
@pytest.mark.parametrize(("case", "stop"), pairs(STOPS_ON_TWO_RANKS), ids=str)
def test_so_does_one_on_two_ranks(case, stop, folder, two_ranks):
    assert_same_end(folder, case, stop, two_ranks)
    if "full_after" in stop:
        assert "WARNING: no checkpoint at step 4: rank 1: [Errno 28] No space left" in two_ranks
        assert "step_00000002, is kept" in two_ranks


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_number_of_ranks_gives_the_same_curve(before, after, folder):
    name, cut, whole, again = f"from_{before}", [], [], []
    for case, (program, *more) in RESHARDED.items():
        output = f"{name}_{case}"
        start = {"program": program, "flags": flags(folder, output, *more, ranks=before)}
        cut.append({**start, "stop_after": 2})
        rest = flags(folder, output, *more, "--resume_from_checkpoint", ranks=after)
        again.append({"program": program, "flags": rest})
        whole.append({"program": program, "flags": flags(folder, f"{name}_whole_{case}", *more)})
    run(folder, cut, ranks=before, name=f"{name}_cut")
    assert f"{after} ranks (was {before})" in run(folder, again, ranks=after, name=f"{name}_again")
    run(folder, whole, name=f"{name}_whole")
    for case in RESHARDED:
        one, other = (
            timeless_lines(folder / output) for output in (f"{name}_{case}", f"{name}_whole_{case}")
        )
        assert len(one) == len(other)
        for line, expected in zip(one, other, strict=True):
            assert line == pytest.approx(expected, rel=1e-5), case


@pytest.mark.slow
@pytest.mark.parametrize(("number", "launcher"), [(signal.SIGUSR1, []), (signal.SIGTERM, ["torchrun"])])
def test_a_signal_saves_and_ends_the_program_with_a_code_of_its_own(number, launcher, folder, tmp_path):
    """torchrun passes SIGTERM on to its processes."""
    ranks = 2 if launcher else 1
    command = [sys.executable]
    if launcher:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    output = tmp_path / "out"
    long = ["--num_train_epochs=1000", "--dtype=fp32", "--save_interval=0"]
    started = subprocess.Popen(
        [*command, str(SFT), *flags(folder, str(output), *long, ranks=ranks)],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_for_steps(output / "metrics.jsonl", started)
        os.kill(started.pid, number)
        _, told = started.communicate(timeout=120)
    finally:
        started.kill()
    assert f"as {number.name} asked; saved in {output}/checkpoints/step_" in told
    assert len(list(output.glob("checkpoints/step_*/complete.json"))) == 1
    if not launcher:
        assert started.returncode == 75
        assert "Traceback" not in told


def wait_for_steps(metrics: Path, started: subprocess.Popen) -> None:
    """Until a few steps are done."""
    for _ in range(1200):
        if metrics.is_file() and len(metrics.read_text().splitlines()) > 3:
            return
        assert started.poll() is None, started.communicate()
        time.sleep(0.1)
    raise AssertionError("no step was done in two minutes")


@pytest.mark.slow
def test_torchrun_starts_a_killed_run_again_and_it_goes_on_by_itself(folder, two_ranks):
    program, *more = ON_TWO_RANKS["fp32_stage1"]
    runs = [{"program": program, "flags": flags(folder, "killed", *more, ranks=2), "kill_in": 4}]
    (folder / "killed.json").write_text(json.dumps(runs))
    torchrun = ["--standalone", "--nproc_per_node", "2", "--max_restarts", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", *torchrun, WORKER, folder / "killed.json"]
    result = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=300, check=True
    )
    assert "going on from checkpoint" in result.stdout
    weights = ((folder / name / "model.safetensors").read_bytes() for name in ("killed", "fp32_stage1"))
    assert next(weights) == next(weights)
    assert timeless_lines(folder / "killed") == timeless_lines(folder / "fp32_stage1")
