from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import serving
from tiny import save_tiny_model

from dschat.serving.server import Server
from dschat.serving.speaker import Speaker


@pytest.fixture(scope="package")
def folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="package")
def speaker(folder) -> Speaker:
    return Speaker(str(folder), "MODEL")


@pytest.fixture(scope="package")
def server(speaker) -> Iterator[Server]:
    with serving(speaker, tokens=300) as server:
        yield server
