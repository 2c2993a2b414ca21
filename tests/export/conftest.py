"""Models that the tests of this folder share; a test that changes one takes `copy`."""

import shutil
from pathlib import Path

import pytest
from exported_models import provenance, with_template
from tiny import save_tiny_model
from transformers import AutoTokenizer

from dschat.export.export import export_model
from dschat.models.loading import create_critic_model


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "base", tokenizer=with_template())


@pytest.fixture(scope="session")
def reward(base) -> Path:
    """What step 2 hands on; its scores are a quarter of a standard deviation's unit apart from 0."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = create_critic_model(str(base), tokenizer, None)
    folder = base.parent / "reward"
    export_model(model, tokenizer, folder, provenance=provenance("reward", score_mean=0.25, score_std=0.5))
    return folder


@pytest.fixture
def copy(reward, tmp_path) -> Path:
    return Path(shutil.copytree(reward, tmp_path / "copy"))
