"""Requests over HTTP that end: within a time and a size, at one server, through a proxy that is known."""

import contextlib
import functools
import http.client
import ipaddress
import os
import socket
import threading
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


class TooLong(Exception):
    """A reply with more bytes than it may have."""


@dataclass(frozen=True)
class Proxy:
    """What stands between this machine and a server."""

    url: str
    variable: str
    """The environment variable that names it."""


def proxy_of(url: str) -> Proxy | None:
    """The proxy that the environment names for a URL; none for a server on this machine."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if _is_this_machine(host) or urllib.request.proxy_bypass(host):
        return None
    found = urllib.request.getproxies().get(parts.scheme)
    if not found:
        return None
    names = (f"{parts.scheme}_proxy", f"{parts.scheme}_proxy".upper())
    return Proxy(found, next((name for name in names if os.environ.get(name)), names[0]))


def open_url(request: urllib.request.Request, proxy: Proxy | None, *, seconds: float, longest: int) -> bytes:
    """The body of the reply. No redirection is followed.

    Raises `TimeoutError` without a whole reply after so many seconds, whatever trickles in; `TooLong`; and
    what urllib raises.
    """
    deadline = _Deadline(seconds)
    opener = urllib.request.OpenerDirector()
    handlers = [
        urllib.request.ProxyHandler({urlsplit(request.full_url).scheme: proxy.url} if proxy else {}),
        _Handler(deadline),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
    ]
    for handler in handlers:
        opener.add_handler(handler)
    try:
        with deadline, opener.open(request, timeout=seconds) as response:
            body = response.read(longest + 1)
            incomplete = response.length  # what a Content-Length promised and did not come
    except (OSError, http.client.HTTPException) as error:
        if deadline.is_over and not isinstance(error, urllib.error.HTTPError):
            raise TimeoutError(f"no whole reply within {seconds:g} s") from error
        raise
    if len(body) > longest:
        raise TooLong(f"a reply of more than {longest >> 20} MiB")
    if deadline.is_over:
        raise TimeoutError(f"no whole reply within {seconds:g} s")
    if incomplete:
        raise http.client.IncompleteRead(body, incomplete)
    return body


class _Deadline:
    """Shuts the sockets of a request when its time is over: a time-out of their own begins at every byte."""

    def __init__(self, seconds: float) -> None:
        self.is_over = False
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def watch(self, one: socket.socket) -> None:
        """Shut this one too."""
        self._sockets.append(one)
        if self.is_over:
            self._end()

    def _end(self) -> None:
        self.is_over = True
        for one in self._sockets:
            with contextlib.suppress(OSError):  # it has ended by itself
                socket.socket.shutdown(one, socket.SHUT_RDWR)  # under TLS as well, without its good-bye

    def __enter__(self) -> "_Deadline":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._timer.join()


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """HTTP and HTTPS through connections that the deadline knows."""

    def __init__(self, deadline: _Deadline) -> None:
        urllib.request.HTTPSHandler.__init__(self)
        self._deadline = deadline

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(functools.partial(_watched(http.client.HTTPConnection), self._deadline), req)

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(functools.partial(_watched(http.client.HTTPSConnection), self._deadline), req)


@functools.cache
def _watched(kind: type[http.client.HTTPConnection]) -> type[http.client.HTTPConnection]:
    class Watched(kind):
        def __init__(self, deadline: _Deadline, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            self._deadline = deadline

        def connect(self) -> None:
            super().connect()
            self._deadline.watch(self.sock)

    return Watched


def _is_this_machine(host: str) -> bool:
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified
