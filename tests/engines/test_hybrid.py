"""The trial of DeepSpeed's kernels, with made-up engines; real ones run in rlhf/rollout/test_hybrid.py."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from dschat.arguments import HybridArguments
from dschat.engines import hybrid
from dschat.engines.hybrid import Injection, building_hybrid, generating, try_injection

SETTINGS = {**HybridArguments(enable_hybrid_engine=True).config, "max_out_tokens": 64}
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2
)


@pytest.fixture
def phases(monkeypatch):
    """Engines of the trial's model with one kernel, and what was done with them."""
    done = []

    def initialize(*, model, config):
        done.append((len(model.model.layers), config))
        return SimpleNamespace(module=model, _inference_containers=[None]), None

    @contextmanager
    def phase(engine):
        done.append("phase")
        yield

    monkeypatch.setattr(hybrid.deepspeed, "initialize", initialize)
    monkeypatch.setattr(hybrid, "phase", phase)
    return done


def test_kernels_that_answer_alike_are_taken(phases):
    state = torch.get_rng_state()
    injection = try_injection(CONFIG, SETTINGS, torch.bfloat16)
    assert injection == Injection(SETTINGS, layer="LlamaDecoderLayer")
    assert torch.equal(torch.get_rng_state(), state)
    (num_layers, config), phase = phases
    assert (num_layers, phase) == (2, "phase")
    assert config["bf16"] == {"enabled": True}
    assert config["hybrid_engine"] == SETTINGS


def test_kernels_that_answer_otherwise_are_not(phases, monkeypatch):
    answers = iter([torch.eye(2, 64), torch.eye(2, 64).flip(1)])
    monkeypatch.setattr(hybrid, "_logits", lambda *_: next(answers))
    assert "gave other answers (logits off by 1" in try_injection(CONFIG, SETTINGS, torch.float32).obstacle


def test_a_model_without_kernels_and_kernels_that_fail_are_said(monkeypatch):
    def refuse(**_):
        raise ValueError("This op had not been\nimplemented.")

    monkeypatch.setattr(hybrid.deepspeed, "initialize", refuse)
    failed = try_injection(CONFIG, SETTINGS, torch.float32).obstacle
    assert failed.startswith("a trial of those for LlamaDecoderLayer of transformers ")
    assert failed.endswith(" failed (ValueError: This op had not been implemented)")
    monkeypatch.setattr(hybrid.deepspeed, "initialize", lambda model, config: (SimpleNamespace(), None))
    missing = try_injection(CONFIG, SETTINGS, torch.float32).obstacle
    assert missing.startswith("DeepSpeed has none for LlamaDecoderLayer of transformers ")


@pytest.mark.parametrize("injection", [Injection(SETTINGS), Injection(SETTINGS, "there are none")])
def test_random_draws_are_what_they_were_before_the_engine_broadcast_rank_0_s(injection):
    state = torch.get_rng_state()
    with building_hybrid(injection):
        torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_phase_gives_memory_back_where_that_is_asked_for(phases, monkeypatch):
    monkeypatch.setattr(hybrid.gc, "collect", lambda: phases.append("given back"))
    with generating(None, Injection({"release_inference_cache": False})):
        assert phases == ["phase"]
    assert phases == ["phase"]
    with generating(None, Injection({"release_inference_cache": True})):
        pass
    assert phases == ["phase", "phase", "given back"]
