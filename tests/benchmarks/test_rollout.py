"""benchmarks/rollout.py: every way generates, and its figures are those of further tokens."""

import argparse
import itertools

import pytest
import random_models
import rollout
import torch
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_a_step_costs_the_time_of_all_tokens_less_that_of_one():
    clock = itertools.chain([0, 1, 12], [20, 21, 32]).__next__  # one token 1 s, eleven tokens 11 s
    times, failed = rollout.decode_times({"a": lambda length: None}, 11, 1, clock)
    assert times == {"a": [pytest.approx(1000.0)]}
    assert failed == {}


def test_a_way_that_fails_leaves_the_others():
    def broken(length: int) -> None:
        raise RuntimeError("no kernel")

    times, failed = rollout.decode_times(
        {"a": broken, "b": lambda length: None}, 3, 1, itertools.count().__next__
    )
    assert list(times) == ["b"]
    assert failed == {"a": "RuntimeError: no kernel"}


def test_the_fastest_of_ours_is_chosen():
    assert rollout.chosen({"hf": [3.0], "static": [2.0], rollout.HAND_WRITTEN: [1.0]}) == "static"
    paged = {"hf": [3.0], "continuous": [2.0]}
    assert rollout.chosen(paged) == "continuous"
    assert rollout.chosen(paged, takes_continuous=False) == "hf"


def test_every_way_generates_answers_of_the_length_asked_for(tmp_path):
    folder = save_tiny_model(tmp_path, "opt")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompts = rollout.random_prompts(3, 6, len(tokenizer))
    assert prompts.attention_mask[0].all()
    ways = dict(rollout.all_ways(rollout.PlainEngine(model), tokenizer, prompts, 4, only=None))
    assert {rollout.GENERATE, rollout.HAND_WRITTEN, "hf"} <= set(ways)
    assert any(name.startswith("static") for name in ways)
    for name, generate in ways.items():
        found = generate(2)
        answers = found.shape[1] if isinstance(found, torch.Tensor) else found.input_ids.shape[1]
        assert answers in (2, 8), name
    with pytest.raises(SystemExit, match="--only traced: no such way; here are hf; continuous; static"):
        list(rollout.all_ways(rollout.PlainEngine(model), tokenizer, prompts, 4, only=["hf", "traced"]))


@pytest.mark.parametrize("flag", [("--answer", "1"), ("--rounds", "0"), ("--batch", "0")])
def test_what_leaves_nothing_to_measure_is_refused(flag, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["rollout.py", *flag])
    with pytest.raises(SystemExit):
        rollout.parse()
    assert f"{' '.join(flag)} is below" in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["rollout.py", "--model-folder", str(tmp_path)])
    with pytest.raises(SystemExit):
        rollout.parse()
    assert f"--model-folder {tmp_path}: no config.json is there." in capsys.readouterr().err


@pytest.mark.parametrize("size", ["6m", "89m", "opt-350m", "opt-1.3b"])
def test_a_gpu_s_tokens_fit_every_model_that_has_a_name(size, monkeypatch):
    made = {}

    def random_model(name, tokenizer, **options):
        made[name] = len(tokenizer)
        raise SystemExit

    monkeypatch.setattr("sys.argv", ["rollout.py", "--device", "cuda", "--model", size])
    monkeypatch.setattr(rollout, "require_device", lambda device: None)
    monkeypatch.setattr(rollout, "random_model", random_model)
    with pytest.raises(SystemExit):
        rollout.main()
    assert made == {size: random_models.SHAPES[size]["vocab_size"]}


@pytest.mark.parametrize(("key_heads", "cached"), [(None, 4), (1, 2)])
def test_the_floor_counts_weights_and_cache(monkeypatch, key_heads, cached):
    heads = {"num_attention_heads": 2, "num_key_value_heads": key_heads}
    model = argparse.Namespace(
        config=argparse.Namespace(num_hidden_layers=2, hidden_size=4, **heads),
        parameters=lambda: [torch.zeros(10)],
    )
    monkeypatch.setattr(rollout, "bandwidth", lambda device: 1000.0)
    args = argparse.Namespace(device="cpu", batch=3, prompt=8, answer=4)
    assert rollout.floor_ms(model, args) == pytest.approx((10 * 2 + 2 * 2 * 3 * 10 * cached * 2) / 1000 * 1e3)
