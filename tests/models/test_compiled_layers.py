"""Decoder layers that torch compiles; backends that generate no code stand in for the compiler."""

import pytest
import torch
from tiny import save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from dschat.models import compiled_layers
from dschat.models.compiled_layers import compile_layers
from dschat.models.loading import create_critic_model, create_hf_model


def rows(length: int, batch: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.arange(batch * length).view(batch, length) % 90 + 5
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture
def graphs(monkeypatch) -> list[torch.fx.GraphModule]:
    """The graphs that were compiled. They run as they were recorded."""
    found, compiler = [], torch.compile

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(
        compiled_layers.torch, "compile", lambda f, **options: compiler(f, backend=backend, **options)
    )
    yield found
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_losses_and_gradients_are_those_of_the_layers_and_other_sizes_compile_nothing(
    family, graphs, tmp_path
):
    folder = str(save_tiny_model(tmp_path, family))
    plain, compiled = (create_hf_model(AutoModelForCausalLM, folder, tiny_tokenizer()) for _ in range(2))
    assert compile_layers(compiled, compiled.config) == 2
    assert [name for name, _ in plain.named_parameters()] == [n for n, _ in compiled.named_parameters()]
    counts = []
    for length, batch in ((9, 2), (17, 3), (30, 4), (23, 5)):
        batch_of_rows = rows(length, batch)
        for model in (plain, compiled):
            model.zero_grad()
            model(**batch_of_rows, labels=batch_of_rows["input_ids"], use_cache=False).loss.backward()
        for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)
        counts.append(len(graphs))
    assert counts[0] == counts[-1] == 1  # both layers and all sizes


def test_generation_runs_uncompiled(graphs, tmp_path):
    model = create_hf_model(AutoModelForCausalLM, str(save_tiny_model(tmp_path)), tiny_tokenizer())
    compile_layers(model, model.config)
    model.generate(**rows(5), max_new_tokens=3, do_sample=False)
    assert not graphs


def test_a_reward_model_s_layers_are_compiled_too(graphs, tmp_path):
    model = create_critic_model(str(save_tiny_model(tmp_path)), tiny_tokenizer(), None)
    assert compile_layers(model, model.config) == 2
    model(**rows(5), return_values=True)
    assert graphs
