"""The arithmetic of benchmarks/steps.py and its command lines."""

import argparse
from pathlib import Path

import matrix_peak
import pytest
import random_models
import steps

from dschat.arguments import parse_arguments


@pytest.mark.parametrize("size", steps.SIZES)
@pytest.mark.parametrize(
    ("step", "parser"), [("sft", "sft"), ("reward", "reward"), ("dpo", "dpo"), ("ppo", "rlhf")]
)
def test_every_step_is_a_command_line_that_it_accepts(size, step, parser):
    args = argparse.Namespace(folder=Path("/f"), model=size, flags="", share=0.5)
    (program, *flags), left_out = steps.command(args, step, steps.SIZES[size])
    parse_arguments(parser, flags)
    assert (steps.ROOT / program).exists()
    assert left_out >= 1


@pytest.mark.parametrize("flag", [("--threads", "0"), ("--share", "0"), ("--share", "nan"), ("--share", "2")])
def test_a_number_that_leaves_nothing_to_run_is_refused(flag, capsys):
    with pytest.raises(SystemExit):
        steps.parse(flag)
    assert f"{flag[0]} {flag[1]}" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_said_before_models_are_made(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["steps.py", "--device", "cuda", "--folder", str(tmp_path / "models")])
    with pytest.raises(SystemExit, match="--device cuda: torch finds no GPU here"):
        steps.main()
    assert not (tmp_path / "models").exists()


def test_a_forward_pass_takes_two_operations_a_weight_of_its_matrices():
    shape = random_models.SHAPES["6m"]
    matrices = 6 * (4 * 256 * 256 + 2 * 256 * 1024) + 256 * 4096
    assert sum(p.operations for p in matrix_peak.products_of(shape, 1)) == 2 * matrices
    attention = 6 * 2 * 2 * 256 * 50  # two products over half of 100 tokens, in 6 layers
    assert steps.forward_operations(shape, 100, has_head=True) == 2 * matrices + attention
    assert steps.forward_operations(shape, 100, has_head=False) == 2 * (matrices - 256 * 4096) + attention


def test_training_takes_three_forward_passes_of_the_tokens_that_are_no_padding():
    shape = random_models.SHAPES["6m"]
    report = {"samples_per_second": 10.0, "tokens_per_second": 1000.0}
    expected = 3000 * steps.forward_operations(shape, 100, has_head=True)
    assert steps.operations_a_second("sft", report, shape, shape) == pytest.approx(expected)
    pairs = 3000 * steps.forward_operations(shape, 50, has_head=False)
    assert steps.operations_a_second("reward", report, shape, shape) == pytest.approx(pairs)


def test_the_issue_s_model_has_its_number_of_parameters():
    model = random_models.random_model("6m", random_models.word_tokenizer(4096))
    assert model.num_parameters() == 6_050_304


def test_a_word_is_one_token():
    tokenizer = random_models.word_tokenizer(100)
    assert tokenizer("w5 w7")["input_ids"] == [7, 9]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (0, 1, 100)


def test_products_are_timed():
    speed, by_name = matrix_peak.peak([matrix_peak.Product("small", 8, 16, 16, 2)], device="cpu")
    assert speed == pytest.approx(by_name["small"])
    assert speed > 0
