"""What tests of PPO share."""

from pathlib import Path

import pytest
from tiny import save_reward_model, save_tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """An actor and a reward model, in folders of these names, and the model that the latter began as."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "actor", "llama")
    save_tiny_model(folder / "base", "llama", seed=1)
    save_reward_model(folder / "base", folder / "reward")
    return folder
