"""Servers of dschat/serving in the process of a test."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dschat.serving.app import App
from dschat.serving.duels import Duels
from dschat.serving.server import Server
from dschat.serving.speaker import SpokenAnswer
from dschat.serving.worker import Limits, Worker


@contextmanager
def serving(*speakers, votes: Path | None = None, key: str | None = None, **limits) -> Iterator[Server]:
    """A server of these speakers, called a, b."""
    bounds = Limits(**limits)
    workers = [Worker(*pair, most_waiting=bounds.waiting) for pair in zip("ab", speakers, strict=False)]
    duels = Duels(votes, seed=0) if votes else None
    with Server("127.0.0.1", 0, limits=bounds, key=key) as server:
        server.app = App(workers, limits=bounds, settings={}, duels=duels)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class Scripted:
    """A speaker that says the same to everybody, in two pieces."""

    positions = 4096

    def __init__(self, text):
        self.text = text

    def read(self, prompt, *, max_tokens=None):
        return [1] * len(prompt), False

    def answer(self, ids, sampling, on_text, *, sample=0, stops=(), as_written=False):
        half = len(self.text) // 2
        on_text(self.text[:half])
        on_text(self.text[half:])
        return SpokenAnswer(self.text, [1], "stop")
