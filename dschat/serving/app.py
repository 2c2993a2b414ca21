"""What the server answers: OpenAI's endpoints, the page of the chat, duels and votes."""

import hashlib
import itertools
import queue
import re
import threading
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dschat.errors import UserError
from dschat.reports.page import render
from dschat.serving.duels import Duel, Duels
from dschat.serving.protocol import ApiError, Asked, Form, asked, refused
from dschat.serving.settings import completed, sampling_of
from dschat.serving.speaker import SpokenAnswer
from dschat.serving.worker import Busy, Failed, Job, Limits, Worker

FOLDER = Path(__file__).parent
LOOK = 0.2
"""Seconds between two looks at whether a client that waits is still there."""


class Client(Protocol):
    """Who asked."""

    def has_gone(self) -> bool:
        """Whether nobody waits any more."""

    def start_stream(self) -> None:
        """Begin an answer of events."""

    def send_event(self, event: Any) -> None:
        """One event. Raises `OSError` once the client is gone."""


@dataclass(frozen=True)
class File:
    """A part of the page."""

    content: bytes
    kind: str
    headers: Mapping[str, str] = field(default_factory=dict)


def page_files(title: str) -> dict[str, File]:
    """The page by path. Its policy allows its own script and its own styles, and nothing from elsewhere."""
    html = render((FOLDER / "page.html.jinja").read_text(encoding="utf-8"), title=title)
    style = re.search("<style>(.*?)</style>", html, flags=re.DOTALL)
    assert style is not None, "the page has styles"
    digest = b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; script-src 'self'; connect-src 'self'; "
    policy += "img-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    script = (FOLDER / "page.js").read_bytes()
    return {
        "/": File(html.encode(), "text/html; charset=utf-8", {"Content-Security-Policy": policy}),
        "/page.js": File(script, "text/javascript; charset=utf-8"),
    }


class App:
    """Models that answer, one or two of them side by side."""

    def __init__(
        self,
        workers: Sequence[Worker],
        *,
        limits: Limits,
        settings: Mapping[str, float],
        duels: Duels | None = None,
    ) -> None:
        """`settings` are for requests that give none. With `duels` there are two workers.

        Raises `UserError` for settings that do not suit a model.
        """
        self.workers = {worker.name: worker for worker in workers}
        self._limits, self._given, self._duels = limits, dict(settings), duels
        for worker in workers:
            self._settings(worker, {})
        self._samples, self._created = itertools.count(), int(time.time())
        self.files = page_files("Two models side by side" if duels else "Chat")
        self._closed = threading.Event()

    def get(self, path: str) -> Any:
        """The file or list at a path. Raises `ApiError`."""
        if path in self.files:
            return self.files[path]
        shared = {"object": "model", "created": self._created, "owned_by": "dschat"}
        models = {f"/v1/models/{name}": {"id": name, **shared} for name in self.workers}
        if path == "/v1/models":
            return {"object": "list", "data": list(models.values())}
        if path in models:
            return models[path]
        if path == "/health":
            return {"status": "ok"}
        if path == "/about.json":
            settings = self._settings(next(iter(self.workers.values())), {})
            shown = {name: settings[name] for name in ("temperature", "top_p", "max_tokens")}
            return {"models": list(self.workers), "duels": self._duels is not None, "settings": shown}
        raise ApiError(404, "there is nothing at this path", "not_found")

    def post(self, path: str, body: Any, client: Client) -> Any:
        """The answer to a request; None where it was streamed. Raises `ApiError`."""
        if path in ("/v1/chat/completions", "/v1/completions"):
            return self._complete(body, client, is_chat="chat" in path)
        if path == "/duels" and self._duels is not None:
            return self._duel(body, client, self._duels)
        if path == "/votes" and self._duels is not None:
            return self._duels.vote(body)
        raise ApiError(404, "there is nothing at this path", "not_found")

    def close(self) -> None:
        """End the answers in progress, and then the workers."""
        self._closed.set()
        for worker in self.workers.values():
            worker.close()

    def _settings(self, worker: Worker, given: Mapping[str, float]) -> dict[str, float]:
        """All settings of a request. Those that nobody gave follow from the model's room."""
        return completed({**self._given, **given}, self._room(worker))

    def _room(self, worker: Worker) -> int:
        return min(self._limits.length, worker.speaker.positions or self._limits.length)

    def _complete(self, body: Any, client: Client, *, is_chat: bool) -> Any:
        request = asked(body, is_chat=is_chat, most_tokens=self._limits.tokens)
        name = request.model or next(iter(self.workers))
        if name not in self.workers:
            raise ApiError(404, f"there is no model {name!r:.200} here", "model_not_found", "model")
        worker = self.workers[name]
        job = self._job(worker, request)
        form = Form(is_chat, name, len(job.ids))
        with self._running(client, {worker: job}) as events:
            if not request.streams:
                return form.whole(next(event for _, event in events if isinstance(event, SpokenAnswer)))
            client.start_stream()
            client.send_event(form.chunk("", is_first=True))
            for _, event in events:
                if isinstance(event, SpokenAnswer):
                    client.send_event(form.last_chunk(event))
                    if request.wants_usage:
                        client.send_event(form.usage_chunk(event))
                else:
                    client.send_event(form.chunk(event))
            client.send_event("[DONE]")
        return None

    def _duel(self, body: Any, client: Client, duels: Duels) -> None:
        request = asked(body, is_chat=True, most_tokens=self._limits.tokens)
        left, right = (self.workers[name] for name in duels.shuffled(list(self.workers)))
        jobs = {left: self._job(left, request, side="left")}
        jobs[right] = self._job(right, request, side="right", events=jobs[left].events)
        duel = Duel(request.conversation, (left.name, right.name), self._settings(left, request.settings))
        with self._running(client, jobs) as events:
            client.start_stream()
            for side, event in events:
                if isinstance(event, SpokenAnswer):
                    duel.answers[side] = event.text
                    client.send_event({"end": side})
                else:
                    client.send_event({"side": side, "text": event})
            client.send_event({"duel": duels.add(duel)})
            client.send_event("[DONE]")

    def _job(
        self, worker: Worker, request: Asked, *, side: str = "", events: "queue.SimpleQueue | None" = None
    ) -> Job:
        """The request in the model's tokens. Raises `ApiError` where they leave it no room."""
        prompt, speaker, given = request.prompt, worker.speaker, request.settings
        try:
            settings = self._settings(worker, given)
            ids = speaker.read_text(prompt) if isinstance(prompt, str) else speaker.read(prompt)[0]
        except UserError as error:
            raise refused(str(error)) from error
        room = self._room(worker) - len(ids)
        if room < (settings["max_tokens"] if "max_tokens" in given else 1):
            wanted = f" and {given['max_tokens']} for the answer" if "max_tokens" in given else ""
            raise ApiError(
                400,
                f"the prompt has {len(ids)} tokens{wanted}; there is room for {self._room(worker)}",
                "context_length_exceeded",
                "messages" if not isinstance(prompt, str) else "prompt",
            )
        settings["max_tokens"] = min(settings["max_tokens"], room)
        return Job(
            ids,
            sampling_of(settings),
            self._limits.seconds,
            sample=0 if "seed" in given else next(self._samples),
            stops=request.stops,
            as_written=isinstance(prompt, str),
            side=side,
            events=queue.SimpleQueue() if events is None else events,
        )

    @contextmanager
    def _running(self, client: Client, jobs: Mapping[Worker, Job]) -> Iterator[Iterator[tuple[str, Any]]]:
        """The events of jobs that go on no longer than the block. Raises `ApiError` where too many wait."""
        try:
            for worker, job in jobs.items():
                worker.submit(job)
            yield self._events(client, list(jobs.values()))
        except Busy:
            raise ApiError(429, "too many requests wait; try again", "server_busy") from None
        finally:
            for job in jobs.values():
                job.cancel()

    def _events(self, client: Client, jobs: Sequence[Job]) -> Iterator[tuple[str, Any]]:
        """Pieces of answers and the answers, with their sides, until all jobs have one.

        Raises `ConnectionError` once the client is gone, and `ApiError` where an answer does not come.
        """
        waiting, next_look = len(jobs), 0.0
        while waiting:
            if time.monotonic() >= next_look:
                self._look_at(client, jobs)
                next_look = time.monotonic() + LOOK
            try:
                side, event = jobs[0].events.get(timeout=LOOK)
            except queue.Empty:
                continue
            if isinstance(event, Failed):
                raise ApiError(500, f"the model failed: {event}", "model_failed")
            if isinstance(event, SpokenAnswer):
                if event.end == "interrupted":
                    self._look_at(client, jobs)
                waiting -= 1
            yield side, event

    def _look_at(self, client: Client, jobs: Sequence[Job]) -> None:
        if client.has_gone():
            raise ConnectionError
        if self._closed.is_set():
            raise ApiError(503, "the server ends", "server_ends")
        if any(job.is_late for job in jobs):
            raise ApiError(408, f"no whole answer in {self._limits.seconds:g} s", "timeout")
