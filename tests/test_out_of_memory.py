"""Where memory runs out: what is said, and that --auto_micro_batch learns the same in smaller parts."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import ROOT, python
from safetensors.torch import load_file
from tiny import save_tiny_model

from dschat import out_of_memory, reference, restart
from dschat.arguments import parse_arguments

WORKER = ROOT / "tests" / "workers" / "out_of_memory.py"
WORDS = ("one", "two", "three", "four", "five", "six")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    rows = [
        {
            "prompt": f"\n\nHuman: Count from {word}{', please' * n}.\n\nAssistant:",
            "chosen": f" {word} and on",
            "rejected": " no",
        }
        for n, word in enumerate(WORDS * 3)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_tiny_model(folder / "base")
    return folder


def sft(folder: Path, output: str, rows: int, *more: str) -> list[str]:
    return [
        f"--model_name_or_path={folder / 'base'}",
        f"--data_path={folder / 'pairs.jsonl'}",
        f"--data_output_path={folder / 'cache'}",
        f"--output_dir={folder / output}",
        f"--per_device_train_batch_size={rows}",
        *("--data_split=1,0,0", "--dtype=fp32", "--learning_rate=1e-3", "--no_enable_tensorboard"),
        *more,
    ]


def run(folder: Path, output: str, rows: int, *more: str, limit: int, rank: int = 0, ranks: int = 1, **how):
    flags = sft(folder, output, rows, *more)
    return python(WORKER, "sft", limit, rank, *flags, ranks=ranks, timeout=200, **how)


def weights(folder: Path, output: str) -> dict[str, torch.Tensor]:
    return load_file(folder / output / "model.safetensors")


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 1)])
def test_a_run_that_starts_again_learns_what_smaller_micro_batches_learn(folder, ranks, rank):
    small, halved = f"small{ranks}", f"halved{ranks}"
    run(folder, small, 2, "--gradient_accumulation_steps=2", limit=99, ranks=ranks)
    result = run(folder, halved, 4, "--auto_micro_batch", limit=2, rank=rank, ranks=ranks)
    assert f"note: rank {rank} ran out of memory while training the model" in result.stdout
    assert "--per_device_train_batch_size 2 and --gradient_accumulation_steps 2" in result.stdout
    ours, theirs = weights(folder, halved), weights(folder, small)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    started = weights(folder, "base")
    assert any(not torch.equal(ours[name], started[name]) for name in started)


def test_the_message_names_phase_consumers_and_flags(folder):
    result = run(folder, "fails", 4, limit=2, check=False)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "out of memory while training the model (Tried to allocate 20.00 GiB.)" in result.stderr
    for consumer in ("weights of the model", "activations, caches and all else", "the machine has"):
        assert f"GiB  {consumer}" in result.stderr or consumer in result.stderr
    advice = "--per_device_train_batch_size 4 -> 2 with --gradient_accumulation_steps 1 -> 2"
    assert advice in result.stderr
    assert "--auto_micro_batch does the first by itself" in result.stderr


def test_one_row_cannot_be_halved(folder):
    result = run(folder, "one_row", 1, "--auto_micro_batch", limit=0, check=False)
    assert result.returncode == 2
    assert "--gradient_checkpointing" in result.stderr
    assert "per_device_train_batch_size" not in result.stderr


@pytest.mark.parametrize(
    ("before", "after"), [((16, 1), (8, 2)), ((3, 2), (2, 3)), ((5, 1), (1, 5)), ((2, 4), (1, 8))]
)
def test_the_product_stays(before, after):
    assert out_of_memory.smaller_parts(*before) == after


@pytest.mark.parametrize(
    ("phase", "flags"),
    [
        ("sampling answers", {"per_device_generation_batch_size": 4, "generation_batches": 6}),
        ("judging answers", {"per_device_training_batch_size": 2, "gradient_accumulation_steps": 4}),
        ("training the critic", {"per_device_training_batch_size": 2, "gradient_accumulation_steps": 4}),
        ("loading the actor", {}),
    ],
)
def test_what_is_halved_in_step_3(phase, flags):
    args = parse_arguments(
        "rlhf",
        [
            *("--actor_model_name_or_path=a", "--critic_model_name_or_path=c", "--generation_batches=3"),
            *("--per_device_generation_batch_size=8", "--per_device_training_batch_size=4"),
            "--gradient_accumulation_steps=2",
        ],
    )
    assert out_of_memory.halved(phase, args) == flags


DPO = ["--model_name_or_path=m", "--data_path=d", "--per_device_train_batch_size=8"]
DPO += ["--per_device_eval_batch_size=2"]


@pytest.mark.parametrize(
    ("phase", "flags"),
    [
        ("judging the training pairs with the reference model",
         {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
        ("evaluating the reference model", {"per_device_eval_batch_size": 1}),
        ("training the model", {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
        ("evaluating", {"per_device_eval_batch_size": 1}),
        ("loading the reference model", {}),
    ],
)  # fmt: skip
def test_what_is_halved_in_dpo(phase, flags):
    assert out_of_memory.halved(phase, parse_arguments("dpo", DPO)) == flags


def test_dpos_reference_pass_is_in_the_phases_whose_batches_it_takes(monkeypatch):
    phases = []

    @contextmanager
    def noted(name):
        phases.append(name)
        yield

    monkeypatch.setattr(reference, "phase", noted)
    monkeypatch.setattr(
        reference, "_logprobs", lambda engine, loader: phases.append(loader) or torch.ones(1, 2)
    )
    reference.logprob_table(
        SimpleNamespace(eval=lambda: None), SimpleNamespace(train="train", evaluation="eval")
    )
    judging, evaluating = (
        "judging the training pairs with the reference model",
        "evaluating the reference model",
    )
    assert phases == [judging, "train", evaluating, "eval"]


def remedies(step: str, phase: str, *argv: str) -> str:
    return "\n".join(out_of_memory.report(phase, parse_arguments(step, argv), MemoryError()))


@pytest.mark.parametrize(
    ("step", "phase", "more", "helps", "does_not"),
    [
        # A frozen model is sharded by stage 3 alone, and training fewer weights of another model is no help.
        ("dpo", "loading the reference model", (), "--zero_stage 0 -> 3", "--zero_stage 0 -> 2"),
        ("dpo", "loading the reference model", (), "--lora_dim 64 --only_optimize_lora", "--offload\n"),
        ("dpo", "evaluating the reference model", ("--zero_stage=3",), "--offload_reference_model", "-> 3"),
        (
            "dpo",
            "evaluating the reference model",
            (),
            "--max_seq_len 512 -> 256",
            "--offload_reference_model",
        ),
        ("rlhf", "loading the reward model", (), "--critic_zero_stage 0 -> 3", "--critic_lora_dim"),
        ("rlhf", "loading the reward model", (), "--critic_zero_stage 0 -> 3", "--offload\n"),
        ("rlhf", "training the actor", (), "--offload with --actor_zero_stage 2", "--critic_zero_stage"),
        ("rlhf", "judging answers", ("--critic_zero_stage=3",), "--offload_reward_model", "_reference_model"),
    ],
)
def test_what_helps_is_what_the_phase_needs(monkeypatch, step, phase, more, helps, does_not):
    monkeypatch.setattr(out_of_memory, "world_size", lambda: 2)
    monkeypatch.setattr(out_of_memory, "current_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(out_of_memory, "_consumers", list)
    models = ["--actor_model_name_or_path=a", "--critic_model_name_or_path=c"]
    said = remedies(step, phase, *(DPO if step == "dpo" else models), *more)
    assert helps in said
    assert does_not not in said


def test_no_remedy_is_for_a_model_that_is_not_there(monkeypatch):
    monkeypatch.setattr(out_of_memory, "world_size", lambda: 2)
    monkeypatch.setattr(out_of_memory, "_consumers", list)
    argv = ["--actor_model_name_or_path=a", "--reward_function=r.py:f", "--advantage_estimator=reinforce++"]
    said = remedies("rlhf", "judging answers", *argv)
    assert "--actor_zero_stage 0 -> 2" in said
    assert "critic" not in said


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."), True),
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(2, "No such file"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, is_one):
    assert out_of_memory.is_out_of_memory(error) is is_one


@pytest.mark.parametrize("start", [["-u", "main.py"], ["-m", "package.main"]])
def test_the_command_keeps_how_python_was_started(start):
    arguments = ["--local_rank=1", "--data_path", "a", "b", "--rows=4", "--more", "1"]
    command = restart.command(["python3", *start, *arguments], arguments, {"rows": 2, "more": 2})
    kept = ["--local_rank=1", "--data_path", "a", "b", "--more", "1"]
    assert command == [sys.executable, *start, *kept, "--rows=2", "--more=2"]
