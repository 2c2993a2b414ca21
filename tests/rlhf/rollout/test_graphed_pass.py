"""Passes as CUDA graphs; on a CPU a graph is played by calling what it was captured of on the same memory."""

import contextlib
import gc
from dataclasses import replace

import pytest
import torch
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from dschat.data.collate import PromptBatch
from dschat.rlhf.rollout import decode_attention, graphed_pass
from dschat.rlhf.rollout.decode_cache import DecodeCache
from dschat.rlhf.rollout.decode_modes import MODES, Decoding, agreeing_modes
from dschat.rlhf.rollout.graphed_pass import GraphedPass
from dschat.rlhf.rollout.keyed_sampling import TokenDraw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = MODES["graphed"] if DEVICE == "cuda" else replace(MODES["graphed"], attention=decode_attention.NAME)
GRAPHED = {"graphed": (KERNELS, MODES["matmul"]), "graphed sdpa": (MODES["graphed sdpa"], MODES["sdpa"])}
"""Modes, and those that do the same without graphs. On a CPU there are no kernels of Triton."""
CAPTURED = graphed_pass.captured
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(autouse=True)
def captures(monkeypatch):
    """How often a pass was captured."""
    count, capture = [], graphed_pass.captured

    def counted(run, pool):
        count.append(run)
        return capture(run, pool) if DEVICE == "cuda" else run

    monkeypatch.setattr(graphed_pass, "captured", counted)
    if DEVICE == "cpu":
        monkeypatch.setattr(graphed_pass, "on_side_stream", lambda run: run())
        monkeypatch.setattr(graphed_pass, "has_kernels", lambda: False)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    return count


@pytest.fixture(scope="module", params=["llama", "opt", "gpt2", "gpt_neox", "gemma"])
def model(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(request.param, 100)).eval().to(DEVICE)


def decoded(model, recorded, num_rows: int, length: int, mode=KERNELS) -> list[torch.Tensor]:
    """The logits after three tokens behind prompts, the last of every second row alone."""
    ids = (torch.arange(num_rows * length, device=DEVICE).view(num_rows, length) * 7) % 100
    mask = torch.ones_like(ids)
    mask[0, : length // 2] = 0
    zeros = torch.zeros(num_rows, dtype=torch.long, device=DEVICE)
    found = []
    with torch.no_grad():
        prompts = PromptBatch(ids, mask, zeros, zeros, zeros)
        decoding = Decoding(model, prompts, mode, 4, recorded or mode.recorded_pass(model))
        for token in (3, 5):
            decoding.read(torch.full((num_rows,), token, device=DEVICE))
            found.append(decoding.logits.clone())
        decoding.keep(torch.arange(0, num_rows, 2, device=DEVICE))
        decoding.read(torch.full(((num_rows + 1) // 2,), 8, device=DEVICE))
    return [*found, decoding.logits.clone()]


@pytest.mark.parametrize("mode", GRAPHED)
def test_batches_of_all_sizes_give_the_logits_of_passes_without_graphs(model, mode):
    graphed, plain = GRAPHED[mode]
    recorded = GraphedPass(model)
    for num_rows, length in ((4, 10), (2, 40), (6, 31), (4, 10)):
        expected = decoded(model, None, num_rows, length, plain)
        torch.testing.assert_close(decoded(model, recorded, num_rows, length, graphed), expected, **CLOSE)


def test_a_shape_is_captured_once(model, captures):
    recorded = GraphedPass(model)
    decoded(model, recorded, 6, 31)  # the largest; in 32 columns, then in 64
    before = len(captures)
    for num_rows, length in ((6, 31), (4, 10), (4, 12)):
        decoded(model, recorded, num_rows, length)
    assert before == 3  # 6 rows of 32 and of 64 columns, 3 of 64
    assert len(captures) - before == 2  # 4 rows and 2 rows of 32 columns


def test_what_is_replayed_prepares_nothing(model, monkeypatch):
    recorded, prepared = GraphedPass(model), []
    of_states = DecodeCache.of_states
    monkeypatch.setattr(DecodeCache, "of_states", lambda *a, **b: prepared.append(1) or of_states(*a, **b))
    decoded(model, recorded, 6, 31)
    before = len(prepared)
    decoded(model, recorded, 6, 31)
    assert len(prepared) == before == 3


def test_weights_that_changed_or_moved_are_those_of_the_next_batch(model):
    recorded = GraphedPass(model)
    before = decoded(model, recorded, 4, 10)
    weights = [next(p for p in model.parameters() if p.dim() == 1)]
    weights += [p for name, p in model.named_parameters() if "k_proj.weight" in name]
    for weight in weights:
        for change in (lambda p: p.add_(0.3), lambda p: setattr(p, "data", p.data + 0.3)):
            with torch.no_grad():
                change(weight)
            after = decoded(model, recorded, 4, 10)
            assert not torch.equal(after[0], before[0])
            torch.testing.assert_close(after, decoded(model, None, 4, 10, MODES["matmul"]), **CLOSE)
            before = after


def test_draws_are_those_of_the_draw_itself(captures):
    recorded = GraphedPass(torch.nn.Linear(1, 1))
    generator = torch.Generator().manual_seed(0)
    for options in ({}, {"temperature": 0.5}, {"top_k": 5, "top_p": 0.8}, {"greedy": True}):
        draw = TokenDraw(num_tokens=90, with_logprobs="temperature" in options, **options)
        for num_rows in (4, 6, 2, 6):
            logits = torch.randn(num_rows, 100, generator=generator).to(DEVICE)
            uniforms = torch.rand(num_rows, dtype=torch.float64, generator=generator).to(DEVICE)
            found = recorded.draw(draw, logits, uniforms)
            torch.testing.assert_close(found, draw(logits, uniforms))


def test_large_buffers_are_given_back_between_rollouts(model, monkeypatch, captures):
    recorded = GraphedPass(model)
    for memory, kept in ((2**40, True), (2**10, False)):
        decoded(model, recorded, 4, 10)
        monkeypatch.setattr(graphed_pass, "device_memory", lambda memory=memory: memory)
        before = len(captures)
        recorded.end()
        decoded(model, recorded, 4, 10)
        assert (len(captures) == before) is kept


def test_graphs_are_for_gpus_and_there_the_only_modes(model):
    with torch.no_grad():
        found = agreeing_modes(model, num_tokens=90, longest=64)
    assert {MODES[name].is_graphed for name in found} == {DEVICE == "cuda"}


def test_pythons_collector_is_off_while_a_pass_is_captured(monkeypatch):
    seen = []

    class Graph:
        replay = staticmethod(lambda: seen.append("replayed"))

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    replay = CAPTURED(lambda: seen.append(gc.isenabled()), (0, 1))
    replay()
    assert seen == [False, "replayed"]
    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="no kernel"):
        CAPTURED(raise_error, (0, 1))
    assert gc.isenabled()


def raise_error() -> None:
    raise RuntimeError("no kernel")
