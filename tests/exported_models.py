"""Exported models with manifests, for tests: made, changed by hand, and refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer

from dschat.data.templates import PLAIN
from dschat.errors import UserError
from dschat.export.provenance import Provenance
from dschat.export.upstream import verify_model

FLAG = "--critic_model_name_or_path"
ROWS = [[5, 80, 90, 11], [7, 8, 9, 60, 61, 62, 0], [33, 44]]


def provenance(step: str, head: str | None = None, **figures: float) -> Provenance:
    return Provenance(step=step, base_model="base", golden_inputs=ROWS, head=head, metrics=figures)


def with_template(template: str = PLAIN):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def edit(folder: Path, **values: object) -> None:
    """Change the manifest by hand."""
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def broken(folder: Path, *heads: str) -> str:
    """The message of a folder that is not accepted."""
    with pytest.raises(UserError) as error:
        verify_model(str(folder), FLAG, *(heads or ("score",)))
    assert FLAG in str(error.value)
    return str(error.value)


def corrupt(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def with_random_head(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    head = state["score.weight"]
    state["score.weight"] = torch.randn(head.shape, generator=generator).to(head) / 33**0.5
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
