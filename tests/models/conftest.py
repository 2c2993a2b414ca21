"""Models that several test modules of this folder change on disk and load."""

from pathlib import Path

import pytest
from tiny import save_tiny_model, tiny_tokenizer

from dschat.export.export import export_model
from dschat.models.loading import create_critic_model


@pytest.fixture
def base(tmp_path) -> Path:
    """A language model."""
    return save_tiny_model(tmp_path / "base", "llama")


@pytest.fixture
def reward(base, tmp_path) -> Path:
    """A reward model as step 2 exports it."""
    export_model(
        create_critic_model(str(base), tiny_tokenizer(), None), tiny_tokenizer(), tmp_path / "reward"
    )
    return tmp_path / "reward"
