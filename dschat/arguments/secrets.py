"""What of a command line is kept out of files and messages: passwords and tokens in URLs."""

import re
from typing import Any

HIDDEN = "***"
_URL = re.compile(r"\bhttps?://[^\s'\"]+", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """The text with *** for the user and password of each URL in it, and for the values of its query."""
    return _URL.sub(lambda match: _hidden(match[0]), text)


def recorded(value: Any) -> Any:
    """A flag's value as files have it."""
    if isinstance(value, list):
        return [recorded(entry) for entry in value]
    return without_secrets(value) if isinstance(value, str) else value


def _hidden(url: str) -> str:
    address, mark, query = url.partition("?")
    scheme, host = re.fullmatch(r"(.*?://)(.*)", address).groups()
    user, at, _ = host.partition("/")[0].rpartition("@")
    if at:
        host = HIDDEN + host[len(user) :]
    parts = [f"{name}={HIDDEN}" if is_pair else HIDDEN for name, is_pair, _ in map(_pair, query.split("&"))]
    return scheme + host + (mark + "&".join(parts) if mark else "")


def _pair(part: str) -> tuple[str, str, str]:
    return part.partition("=")
