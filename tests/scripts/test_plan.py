"""scripts/plan.py: its command lines, and what it prints."""

import json
import shlex

import pytest
from processes import ROOT, python
from tiny import save_tiny_model

from dschat.arguments import parse_arguments
from dschat.errors import UserError
from scripts import plan


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return ["--model_name_or_path", str(save_tiny_model(tmp_path_factory.mktemp("m"))), "--data_path", "d"]


def test_the_command_line_that_fits_is_one_of_the_step(flags, capsys):
    own = ["--gpus", "1", "--fit", "0.75GB", "--steps", "5"]
    assert plan.main(["sft", *flags, "--zero_stage", "0", "--per_device_train_batch_size=64", *own]) == 0
    command, first, *_ = capsys.readouterr().out.splitlines()
    program, *words = shlex.split(command)[1:]
    assert program == "step1_sft/main.py"
    fitting = parse_arguments("sft", words)
    assert fitting.batch.per_device_train_batch_size * fitting.optimizer.gradient_accumulation_steps == 64
    assert "to train" in first or "to evaluate" in first


def test_what_does_not_fit_is_said(flags, capsys):
    assert plan.main(["sft", *flags, "--gpus", "8", "--gpu_memory", "0.601GB"]) == 1
    out = capsys.readouterr().out
    assert "does not fit" in out
    assert "would cut most" in out


def test_flags_of_the_step_are_checked(flags):
    with pytest.raises(UserError, match="max_seq_len"):
        plan.main(["sft", *flags, "--max_seq_length", "5", "--gpus", "1"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--gpus 0", "--gpus must be at least 1, got 0"),
        ("--gpus_per_host 0", "--gpus_per_host must be at least 1"),
        ("--steps -3", "--steps must be at least 1"),
        ("--price_per_hour -2", "--price_per_hour must be a number of at least 0, got -2"),
        ("--price_per_hour nan", "--price_per_hour must be a number of at least 0, got nan"),
        ("--gpus 1 --host_memory lots", "--host_memory 'lots' is no size"),
        ("--gpus 12", "--gpus 12 are no whole hosts of --gpus_per_host 8"),
        ("--fit 24", "--fit 24 is 24 bytes, .*as in 24GB"),
        ("--fit 0GB", "--fit 0GB is 0 bytes"),
        ("--gpu_memory lots --gpus 1", "--gpu_memory 'lots' is no size"),
    ],
)
def test_values_that_are_none_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        plan.hardware_of(plan.parse(["sft", *words.split()])[0])


def test_a_price_without_time_says_what_is_missing(flags, capsys):
    assert plan.main(["sft", *flags, "--gpus", "16", "--price_per_hour", "2"]) == 0
    assert "plan: no cost, as the time of a step is not known" in capsys.readouterr().out


def test_a_command_line_names_hosts_and_stage_0():
    step = parse_arguments("sft", ["--model_name_or_path=m", "--data_path=d"])
    words = ["--model_name_or_path=m", "--data_path=d", "--zero_stage", "3"]
    found = plan.command(step, words, {"zero_stage": 0, "gradient_checkpointing": False}, 16, 8)
    assert found == (
        "torchrun --nproc_per_node 8 --nnodes 2 --rdzv_backend c10d --rdzv_endpoint FIRST_HOST:29500 "
        "step1_sft/main.py --model_name_or_path=m --data_path=d --zero_stage 0"
    )


def test_a_command_line_can_be_pasted_whatever_its_words_hold():
    words = ["--model_name_or_path", "my models/7b", "--data_path", "a b.jsonl", "c'd.jsonl"]
    step = parse_arguments("sft", words)
    found = shlex.split(plan.command(step, words, {"zero_stage": 2}, 1, 8))
    assert found == ["python", "step1_sft/main.py", *words, "--zero_stage", "2"]


@pytest.mark.parametrize(
    ("sharing", "gpus", "message"),
    [
        ("--tensor_parallel_size 2", 3, "tensor 2, need a multiple of 2 ranks, and this run has 3"),
        ("--tensor_parallel_size 8", 16, "--tensor_parallel_size 8: .* has num_attention_heads 4"),
        ("--sequence_parallel_size 8", 8, "--sequence_parallel_size 8 does not divide the 4 attention heads"),
        ("--pipeline_parallel_size 4", 4, "--pipeline_parallel_size 4 is more than the model's 2 layers"),
    ],
)
@pytest.mark.parametrize("fit", [[], ["--fit", "24GB"]])
def test_what_a_run_would_refuse_is_not_planned(flags, sharing, gpus, message, fit):
    with pytest.raises(UserError, match=message):
        plan.main(["sft", *flags, *sharing.split(), "--gpus", str(gpus), "--gpus_per_host", "8", *fit])


@pytest.mark.matrix
def test_ranks_that_share_weights_are_timed_together_and_rank_0_prints(flags, tmp_path):
    words = ("sft", *flags, "--zero_stage=3", "--dtype=fp32", "--max_seq_len=32")
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    out = python(ROOT / "scripts" / "plan.py", *words, ranks=2, env=env).stdout
    assert out.count(" s a step (forward_backward") == 1
    (kept,) = [
        decision["key"]
        for path in (tmp_path / "dschat" / "choices").glob("*.json")
        if (decision := json.loads(path.read_text()))["name"] == "seconds of a slice"
    ]
    assert kept["ranks"] == 2
    assert kept["zero_stage"] == 3
