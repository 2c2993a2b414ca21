import pytest
import torch
from tiny import save_tiny_model

from dschat.errors import UserError
from dschat.models import sequence_trial
from dschat.models.sequence_trial import check_sequence_parallel, try_sequence_parallel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize(
    ("family", "size", "parts"),
    [
        ("llama", 3, "does not divide the 4 attention heads of the model in .*; give one of 1, 2, 4"),
        ("opt", 8, "--sequence_parallel_size 8 does not divide the 4 attention heads"),
        ("bloom", 2, "the attention of 'bloom', .* cannot be replaced in transformers"),
        ("gptj", 2, "the attention of 'gptj'"),
        ("falcon_alibi", 2, "the attention of 'falcon'"),
    ],
)
def test_heads_that_ranks_cannot_share_are_refused_from_the_configuration(family, size, parts, folder):
    path = save_tiny_model(folder / family, family)
    for file in path.glob("*.safetensors"):
        file.unlink()  # nothing of the model is loaded
    check_sequence_parallel(str(path), 1)
    with pytest.raises(UserError, match=parts):
        check_sequence_parallel(str(path), size)


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "gpt_neox"])
def test_ranks_may_be_more_than_key_heads(family, folder):
    check_sequence_parallel(str(save_tiny_model(folder / family, family)), 4)


def test_outputs_that_differ_and_trials_that_fail_are_refused_with_the_reason(folder, monkeypatch):
    path = str(save_tiny_model(folder / "mistral", "mistral"))
    monkeypatch.setattr(sequence_trial, "ULYSSES", "sdpa")
    try_sequence_parallel(path, torch.device("cpu"))
    monkeypatch.setattr(sequence_trial, "ULYSSES", "none_such")
    with pytest.raises(UserError, match=r"rows of 'mistral', .*a trial failed: .*none_such"):
        try_sequence_parallel(path, torch.device("cpu"))
    outputs = iter([torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1])])
    monkeypatch.setattr(sequence_trial, "_outputs", lambda *args: next(outputs))
    with pytest.raises(UserError, match=r"their outputs differ by 0\.14 standard deviations"):
        try_sequence_parallel(path, torch.device("cpu"))
