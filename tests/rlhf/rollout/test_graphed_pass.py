"""Passes as CUDA graphs; on a CPU a graph is played by calling what it was captured of on the same memory."""

import pytest
import torch
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from dschat.data.collate import PromptBatch
from dschat.rlhf.rollout import graphed_pass
from dschat.rlhf.rollout.decode_modes import MODES, Decoding, agreeing_modes
from dschat.rlhf.rollout.graphed_pass import GraphedPass

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EAGER = {"graphed": "matmul", "graphed sdpa": "sdpa"}


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
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    return count


@pytest.fixture(scope="module", params=["llama", "opt", "gpt2", "gpt_neox", "gemma"])
def model(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(request.param, 100)).eval().to(DEVICE)


def decoded(model, recorded, mode: str, num_rows: int, length: int) -> list[torch.Tensor]:
    """The logits after three tokens behind prompts, the last of every second row alone."""
    ids = (torch.arange(num_rows * length, device=DEVICE).view(num_rows, length) * 7) % 100
    mask = torch.ones_like(ids)
    mask[0, : length // 2] = 0
    zeros = torch.zeros(num_rows, dtype=torch.long, device=DEVICE)
    found = []
    with torch.no_grad():
        prompts = PromptBatch(ids, mask, zeros, zeros, zeros)
        decoding = Decoding(model, prompts, MODES[mode], 4, recorded or MODES[mode].recorded_pass(model))
        for token in (3, 5):
            decoding.read(torch.full((num_rows,), token, device=DEVICE))
            found.append(decoding.logits)
        decoding.keep(torch.arange(0, num_rows, 2, device=DEVICE))
        decoding.read(torch.full(((num_rows + 1) // 2,), 8, device=DEVICE))
    return [*found, decoding.logits]


@pytest.mark.parametrize("mode", EAGER)
def test_batches_of_all_sizes_give_the_logits_of_passes_without_graphs(model, mode, captures):
    recorded = GraphedPass(model)
    for num_rows, length in ((4, 10), (2, 40), (6, 31), (4, 10)):
        expected = decoded(model, None, EAGER[mode], num_rows, length)
        for one, other in zip(decoded(model, recorded, mode, num_rows, length), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0 if DEVICE == "cpu" else 1e-5)


def test_a_shape_is_captured_once(model, captures):
    recorded = GraphedPass(model)
    decoded(model, recorded, "graphed", 6, 31)  # the largest; in 32 columns, then in 64
    before = len(captures)
    for num_rows, length in ((6, 31), (4, 10), (4, 12)):
        decoded(model, recorded, "graphed", num_rows, length)
    assert before == 3  # 6 rows of 32 and of 64 columns, 3 of 64
    assert len(captures) - before == 2  # 4 rows and 2 rows of 32 columns


def test_weights_that_changed_or_moved_are_those_of_the_next_batch(model):
    recorded = GraphedPass(model)
    before = decoded(model, recorded, "graphed", 4, 10)
    weight = next(p for p in model.parameters() if p.dim() == 1)
    for change in (lambda: weight.add_(0.5), lambda: setattr(weight, "data", weight.data + 0.5)):
        with torch.no_grad():
            change()
        after = decoded(model, recorded, "graphed", 4, 10)
        assert not torch.equal(after[0], before[0])
        expected = decoded(model, None, "matmul", 4, 10)
        torch.testing.assert_close(after, expected, rtol=0, atol=0 if DEVICE == "cpu" else 1e-5)
        before = after


def test_large_buffers_are_given_back_between_rollouts(model, monkeypatch, captures):
    recorded = GraphedPass(model)
    for memory, kept in ((2**40, True), (2**10, False)):
        decoded(model, recorded, "graphed", 4, 10)
        monkeypatch.setattr(graphed_pass, "device_memory", lambda memory=memory: memory)
        before = len(captures)
        recorded.end()
        decoded(model, recorded, "graphed", 4, 10)
        assert (len(captures) == before) is kept


def test_graphs_are_for_gpus_and_there_the_only_modes(model):
    with torch.no_grad():
        found = agreeing_modes(model, num_tokens=90, longest=64)
    assert {MODES[name].is_graphed for name in found} == {DEVICE == "cuda"}
