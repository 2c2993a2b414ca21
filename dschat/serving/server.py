"""HTTP for an `App`: which requests are let in, how they are read, and how answers are sent.

transformers' own server is not used. In transformers 5.23 its requests wait without bound
(cli/serving/utils.py, InferenceThread), an answer that does not stream goes on when its client is gone
(GenerateManager.generate_non_streaming), POST /load_model reads whatever path or hub id it is given
(server.py), prompts and settings are not those of training, and errors are not in OpenAI's form.
"""

import hmac
import io
import ipaddress
import json
import select
import socket
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from dschat.console import messages
from dschat.errors import UserError
from dschat.serving.app import App, File
from dschat.serving.protocol import ApiError
from dschat.serving.worker import Limits

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}
OVERLOADED = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
MOST_DISCARDED = 2**24
"""Bytes of a refused request that are read, so that its client gets to read why."""


def is_loopback(host: str) -> bool:
    """Whether an address or name is this machine's own alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class _InTime(io.RawIOBase):
    """What a socket brings before a deadline; then reading raises `TimeoutError`."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection, self._deadline = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class Handler(BaseHTTPRequestHandler):
    """One request, after which the connection ends."""

    server: "Server"
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "dschat", ""

    def setup(self) -> None:
        """Give the request its time."""
        super().setup()
        self._is_underway = False
        self.rfile = io.BufferedReader(_InTime(self.connection, self.server.limits.reading))

    def handle(self) -> None:
        """Answer one request; a client that goes away is no error."""
        try:
            self.handle_one_request()
            self.wfile.flush()
        except OSError:
            pass
        finally:
            self.close_connection = True

    def do_GET(self) -> None:
        """Pages and lists."""
        self._answer(lambda path: self.server.app.get(path))

    def do_POST(self) -> None:
        """What asks a model, and votes."""
        self._answer(lambda path: self.server.app.post(path, self._body(), self))

    def _answer(self, respond: Any) -> None:
        self._has_body = self.headers.get("Content-Length", "0") != "0"
        self._is_read = False
        try:
            self._check_sender()
            found = respond(urlsplit(self.path).path)
            if isinstance(found, File):
                self._send(200, found.content, found.kind, found.headers)
            elif found is not None:
                self._send(200, json.dumps(found).encode())
        except ApiError as error:
            self.refuse(error)
        except (ConnectionError, BrokenPipeError):
            pass
        except Exception as error:  # a bug: the other requests go on
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            messages.warning(f"the server failed at {self.command} {self.path!r:.100}: {problem}")
            self.refuse(ApiError(500, "the server failed at this request", "internal_error"))

    def _check_sender(self) -> None:
        """Raise `ApiError` for a page of elsewhere, or one that has this machine under another name, and for
        a sender without the key."""
        headers, server = self.headers, self.server
        if server.key is None and not is_loopback(urlsplit(f"//{headers.get('Host', '')}").hostname or ""):
            raise ApiError(403, "the Host of the request is not this machine's own", "host_not_allowed")
        origin = headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc.lower() != headers.get("Host", "").lower():
            raise ApiError(403, "requests of pages from elsewhere are refused", "origin_not_allowed")
        if headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise ApiError(403, "requests of pages from elsewhere are refused", "origin_not_allowed")
        given = headers.get("Authorization", "").removeprefix("Bearer ").strip()
        is_open = server.key is None or urlsplit(self.path).path in server.app.files
        if not is_open and not hmac.compare_digest(given.encode(), (server.key or "").encode()):
            raise ApiError(401, "a key is needed: Authorization: Bearer KEY", "invalid_api_key")

    def _body(self) -> Any:
        """The JSON of the request's body. Raises `ApiError`."""
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "Content-Type must be application/json", "unsupported_media_type")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            raise ApiError(411, "Content-Length must say how long the body is", "length_required")
        if int(length[:20]) > self.server.limits.body:
            raise ApiError(413, f"a body has at most {self.server.limits.body} bytes", "body_too_large")
        try:
            text = self.rfile.read(int(length))
        except TimeoutError:
            raise ApiError(408, f"no whole body in {self.server.limits.reading:g} s", "timeout") from None
        if len(text) < int(length):
            raise ConnectionError
        self._is_read = True
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is no JSON: {str(error)[:200]}", "invalid_json") from error

    def has_gone(self) -> bool:
        """Whether the client has hung up."""
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""
        except (OSError, ValueError):
            return True

    def start_stream(self) -> None:
        """Begin an answer of events."""
        self._head(200, "text/event-stream", {})

    def send_event(self, event: Any) -> None:
        """One event of it. Raises `OSError` once the client is gone."""
        data = event if isinstance(event, str) else json.dumps(event)
        self.wfile.write(f"data: {data}\n\n".encode())

    def refuse(self, error: ApiError) -> None:
        """Say why there is no answer, in an event where it has begun."""
        if self._is_underway:
            self.send_event(error.body)
            return
        headers = {"Retry-After": "1"} if error.status == 429 else {}
        self._send(error.status, json.dumps(error.body).encode(), headers=headers)
        if not getattr(self, "_is_read", True) and self._has_body:
            self._discard()

    def _discard(self) -> None:
        """Read on for a moment: a connection that ends with unread bytes takes the answer with it."""
        self.connection.shutdown(socket.SHUT_WR)
        end, left = time.monotonic() + 1, MOST_DISCARDED
        while left > 0 and time.monotonic() < end:
            self.connection.settimeout(0.5)
            found = len(self.connection.recv(2**16))
            if not found:
                return
            left -= found

    def _send(
        self,
        status: int,
        content: bytes,
        kind: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._head(status, kind, {"Content-Length": str(len(content)), **(headers or {})})
        self.wfile.write(content)

    def _head(self, status: int, kind: str, headers: Mapping[str, str]) -> None:
        self._is_underway = True
        self.connection.settimeout(self.server.limits.reading)
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Connection": "close", **HEADERS, **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server refuses by itself, in OpenAI's form."""
        self._is_underway = False
        self.refuse(ApiError(int(code), message or "the request cannot be read", "bad_request"))

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: people's questions stay theirs."""


class Server(ThreadingHTTPServer):
    """Listens for an app. Raises `UserError` where it cannot listen."""

    daemon_threads, block_on_close, request_queue_size = True, False, 128

    app: App
    """What answers, set before the first request is taken; connections wait until then."""

    def __init__(self, host: str, port: int, *, limits: Limits, key: str | None = None) -> None:
        """Without a `key` only requests that name this machine by its own names are answered."""
        self.limits, self.key = limits, key
        self._connections = threading.BoundedSemaphore(limits.connections)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            problem = f"--host {host} --port {port} cannot be listened on ({error}); give another port"
            raise UserError(f"{problem}, or --port 0 for any that is free.") from error

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the connection, while there are not too many."""
        if self._connections.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        try:
            request.settimeout(1)
            request.sendall(OVERLOADED)
        except OSError:
            pass
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """As the library's."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks ends itself alone."""

    def server_close(self) -> None:
        """Listen no more, and end the answers in progress."""
        super().server_close()
        if hasattr(self, "app"):
            self.app.close()
