"""POST requests over HTTP, bounded in time and size, to one server or through the proxy before it."""

import asyncio
import functools
import ipaddress
import os
import ssl
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx2


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


def post(
    url: str,
    body: bytes,
    proxy: Proxy | None,
    *,
    seconds: float,
    longest: int,
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """The body of the reply to a POST of JSON, of at most `longest` bytes. No redirection is followed.

    A user and password in the URL are sent as HTTP's basic authentication.

    Raises `TimeoutError` without a whole reply after so many seconds, whatever trickles in; `TooLong`;
    `httpx2.HTTPStatusError` for a status that is not 2xx; and what else `httpx2` raises.
    """
    return asyncio.run(_post(url, body, proxy, seconds, longest, headers or {}))


async def _post(
    url: str, body: bytes, proxy: Proxy | None, seconds: float, longest: int, further: Mapping[str, str]
) -> bytes:
    # `longest` bounds what is unpacked, too.
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", **further}
    through = _proxy_url(proxy) if proxy else None
    reply = bytearray()
    try:
        # httpx's own time-outs begin again at every byte.
        async with (
            asyncio.timeout(seconds),
            httpx2.AsyncClient(
                proxy=through, trust_env=False, timeout=None, verify=_certificates()
            ) as client,
            client.stream("POST", url, content=body, headers=headers) as response,
        ):
            response.raise_for_status()
            async for piece in response.aiter_raw():
                reply += piece
                if len(reply) > longest:
                    raise TooLong(f"a reply of more than {longest >> 20} MiB")
    except TimeoutError as error:
        raise TimeoutError(f"no whole reply within {seconds:g} s") from error
    return bytes(reply)


def _proxy_url(proxy: Proxy) -> str:
    """The proxy's URL; a host and port alone are one of HTTP. Raises `OSError` for another kind of proxy."""
    url = proxy.url if "://" in proxy.url else f"http://{proxy.url}"
    scheme = url.partition("://")[0]
    if scheme not in ("http", "https"):
        raise OSError(f"unknown url type: {scheme}")
    return url


@functools.cache
def _certificates() -> ssl.SSLContext:
    return ssl.create_default_context()


def cause_of(error: BaseException) -> str:
    """The reason of a failed POST in the operating system's words where no connection came about."""
    if isinstance(error, httpx2.ConnectError):  # which says that all attempts failed, and keeps why
        while (inner := error.__cause__ or error.__context__) is not None:
            error = inner
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, OSError) and (error.strerror or "").startswith("Connect call failed"):
            return f"[Errno {error.errno}] {os.strerror(error.errno or 0)}"
    return str(error)


def _is_this_machine(host: str) -> bool:
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified
