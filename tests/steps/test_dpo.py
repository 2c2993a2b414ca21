"""DPO run for real: as a user starts it, and on other ranks, stages and batches."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from figures import timeless_lines, unwritten_metrics
from processes import ROOT, python
from safetensors.torch import load_file
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM

DPO = ROOT / "step2_reward" / "dpo.py"
WORKER = ROOT / "tests" / "workers" / "dpo_runs.py"
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
STEP = ("loss", "accuracy", "reward_margin", "chosen_reward", "rejected_reward")
LOGPROBS = ("chosen_logprob", "rejected_logprob")
LORA = ("--lora_dim=4", "--only_optimize_lora", "--lora_learning_rate=1e-2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, 24 pairs with margins, and 6 prompts with three answers each, whose pairs weigh a third."""
    folder = tmp_path_factory.mktemp("dpo")

    def prompt(i: int) -> str:
        return f"\n\nHuman: Count on from {WORDS[i % 6]}, {'please ' * (i // 6)}friend.\n\nAssistant:"

    pairs = [
        {
            "prompt": prompt(i),
            "chosen": f" {WORDS[i % 6 + 1]} {WORDS[i % 6 + 2]}",
            "rejected": f" {WORDS[(i * 5) % 7]} no{', no' * (i % 3)}",
            "margin": 0.5,
        }
        for i in range(24)
    ]
    ranked = [{"prompt": prompt(24 + i), "answers": [f" {WORDS[i + 1]}", " no", " no no"]} for i in range(6)]
    for name, rows in (("pairs", pairs), ("ranked", ranked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_tiny_model(folder / "base")
    return folder


def flags(folder: Path, name: str, *more: str, cache: str | None = None, rows: int = 8) -> list[str]:
    # Adam divides a gradient by its size, rounding included; the large epsilon lets small ones be small.
    return [
        f"--model_name_or_path={folder / 'base'}",
        f"--output_dir={folder / name}",
        f"--data_output_path={folder / (cache or f'cache_{name}')}",
        *("--data_path", str(folder / "pairs.jsonl"), str(folder / "ranked.jsonl")),
        *("--data_split=0,1,0", "--eval_fraction=0.2", "--dtype=fp32", "--eval_interval=2"),
        *("--learning_rate=3e-3", "--adam_epsilon=1e-3", "--num_train_epochs=2"),
        *(f"--per_device_train_batch_size={rows}", f"--per_device_eval_batch_size={rows}"),
        *more,
    ]


def run_all(folder: Path, runs: dict[str, list[str]], ranks: int) -> dict[str, str]:
    """What each run printed."""
    path = folder / f"runs_{ranks}.json"
    path.write_text(json.dumps(runs))
    said = re.split(r"^== (\w+)\n", python(WORKER, path, ranks=ranks).stdout, flags=re.MULTILINE)
    return dict(zip(said[1::2], said[2::2], strict=True))


@pytest.fixture(scope="module")
def one_rank(folder) -> dict[str, str]:
    """Runs by name. "one" is a program of its own; "again" finds what it kept, "accumulated" does not."""
    said = {"one": python(DPO, *flags(folder, "one"), cwd=folder).stdout}
    accumulation = "--gradient_accumulation_steps=4"
    runs = {
        "again": flags(folder, "again", cache="cache_one"),
        "accumulated": flags(folder, "accumulated", accumulation, cache="cache_one", rows=2),
        "lora": flags(folder, "lora", *LORA),
        "ipo": flags(folder, "ipo", "--loss_type=ipo", "--beta=0.5", cache="cache_one"),
        "bf16": flags(folder, "bf16", "--dtype=bf16", "--gradient_checkpointing"),
    }
    return said | run_all(folder, runs, ranks=1)


@pytest.fixture(scope="module")
def two_ranks(folder, one_rank) -> dict[str, str]:
    """The same on two ranks: DPO at stage 3, adapters at stages 2 and 3."""
    offload = "--offload_reference_model"
    runs = {
        "stage3": flags(folder, "stage3", "--zero_stage=3", offload, rows=4),
        "lora2": flags(folder, "lora2", *LORA, "--zero_stage=2", rows=4),
        "lora3": flags(
            folder, "lora3", *LORA, "--zero_stage=3", offload, "--gradient_accumulation_steps=2", rows=2
        ),
    }
    return run_all(folder, runs, ranks=2)


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def table(cache: Path) -> np.ndarray:
    """The first that was kept."""
    return np.load(min(cache.glob("*/logprobs.npy"), key=lambda path: path.stat().st_mtime))


def assert_same_run(ours: Path, theirs: Path, from_line: int = 0) -> None:
    """Equal metrics, from that line on, and equal weights, to 1e-4."""
    for one, other in list(zip(timeless_lines(ours), timeless_lines(theirs), strict=True))[from_line:]:
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4)
    ours, theirs = (load_file(run / "model.safetensors") for run in (ours, theirs))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def assert_starts_from_the_reference(run: Path) -> None:
    start, first = timeless_lines(run)[:2]
    assert start["step"] == 0
    for name in STEP[2:]:
        assert start[f"eval_{name}"] == first[name] == 0, name
    assert start["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert start["eval_accuracy"] == 0.5
    assert first["accuracy"] == pytest.approx(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "again", "accumulated", "lora", "bf16"])
def test_the_policy_starts_from_exactly_the_reference_model(name, folder, one_rank):
    assert_starts_from_the_reference(folder / name)


@pytest.mark.slow
def test_every_figure_is_reported_each_step_and_before_during_and_after(folder, one_rank):
    rows, result = timeless_lines(folder / "one"), summary(folder / "one")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    assert {*STEP, *LOGPROBS, "learning_rate", "grad_norm"} <= set(steps[0])
    assert unwritten_metrics("dpo", folder / "one") == []
    evaluated = {f"eval_{name}" for name in (*STEP, *LOGPROBS)} | {"eval_accuracy_stderr"}
    assert evaluated <= set(result)
    assert [row["step"] for row in rows if "eval_loss" in row][:2] == [0, 2]
    p, n = result["initial_eval_accuracy"], result["num_eval_rows"]
    assert (p, result["initial_eval_accuracy_stderr"]) == (0.5, 0)  # all are ties
    assert result["step"] == "dpo"
    assert n > 0
    for row in steps:
        assert row["reward_margin"] == pytest.approx(row["chosen_reward"] - row["rejected_reward"], abs=1e-6)


@pytest.mark.slow
def test_it_learns_to_tell_the_answers_apart(folder, one_rank):
    for name in ("one", "lora", "ipo", "bf16"):
        result = summary(folder / name)
        assert result["eval_loss"] < 0.9 * result["initial_eval_loss"], name
        assert result["eval_reward_margin"] > 0, name


@pytest.mark.slow
def test_ipo_reports_means_a_token(folder, one_rank):
    # The lead it aims at is 1 / (2 * 0.5) = 1, so the loss begins at 1.
    start, sums = timeless_lines(folder / "ipo")[0], timeless_lines(folder / "one")[0]
    assert start["eval_loss"] == 1
    assert start["eval_reward_margin"] == 0
    assert 2 * sums["eval_chosen_logprob"] < start["eval_chosen_logprob"] < 0


@pytest.mark.slow
def test_a_second_start_loads_no_reference_model_and_gives_the_same_numbers(folder, one_rank):
    assert "loading the reference model" in one_rank["one"]
    assert "margins, which DPO does not use" in one_rank["one"]
    assert "loading the reference model" not in one_rank["again"]
    assert "log-probabilities come from" in one_rank["again"]
    assert "\n0 weights of the reference model" in one_rank["again"]
    assert timeless_lines(folder / "again") == timeless_lines(folder / "one")


@pytest.mark.slow
def test_the_copy_is_out_of_memory_before_training(folder, one_rank):
    assert re.search(
        r"^[1-9]\d* weights of the reference model have 0 bytes", one_rank["accumulated"], re.MULTILINE
    )


@pytest.mark.slow
def test_accumulation_changes_nothing(folder, one_rank):
    assert_same_run(folder / "accumulated", folder / "one")


@pytest.mark.slow
def test_without_adapters_the_policy_is_the_copy(folder, one_rank):
    assert "the policy without its adapters: no copy is loaded" in one_rank["lora"]
    assert "\n0 weights of the reference model" in one_rank["lora"]
    np.testing.assert_array_equal(table(folder / "cache_lora"), table(folder / "cache_one"))


@pytest.mark.slow
def test_the_kept_numbers_are_those_of_transformers_alone(folder, one_rank):
    (cache,) = (path.parent for path in (folder / "cache_one").glob("*/train"))
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    rows = [row for part in ("train", "evaluation") for row in load_from_disk(str(cache / part))]
    for row, kept in zip(rows, table(folder / "cache_one"), strict=True):
        for name, number in zip(("chosen_ids", "rejected_ids"), kept, strict=True):
            ids, start = torch.tensor([row[name]]), row["prompt_length"]
            logprobs = model(ids).logits.log_softmax(-1)[0, :-1]
            expected = logprobs.gather(1, ids[0, 1:, None])[start - 1 :].sum()
            assert number == pytest.approx(expected.item(), abs=1e-3)


@pytest.mark.slow
def test_the_folder_is_a_language_model_that_says_what_made_it(folder, one_rank):
    assert json.loads((folder / "one" / "manifest.json").read_text())["step"] == "dpo"
    assert "direct preference optimisation (DPO)" in (folder / "one" / "README.md").read_text()
    _, info = AutoModelForCausalLM.from_pretrained(folder / "one", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.slow
def test_two_ranks_at_stage_three_give_the_numbers_of_one(folder, two_ranks):
    assert_starts_from_the_reference(folder / "stage3")
    assert_same_run(folder / "stage3", folder / "one")
    assert re.search(
        r"^[1-9]\d* weights of the reference model have 0 bytes", two_ranks["stage3"], re.MULTILINE
    )
    np.testing.assert_allclose(table(folder / "cache_stage3"), table(folder / "cache_one"), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora2", "lora3"])
def test_adapters_learn_the_same_on_two_ranks(name, folder, two_ranks):
    assert ("--offload_reference_model has nothing to offload" in two_ranks[name]) is (name == "lora3")
    assert_starts_from_the_reference(folder / name)
    assert_same_run(folder / name, folder / "lora")
