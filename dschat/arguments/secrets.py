"""Passwords and tokens in URLs, which are kept out of files and messages."""

import re
from typing import Any

HIDDEN = "***"
_URL = re.compile(r"\b(https?://)(\S+?)(['\"]*(?:\s|$))", re.IGNORECASE)
_PLACE = re.compile(r"(\[.*\]|[^:]*)(:\d*)?")
"""Host and port."""


def without_secrets(text: str) -> str:
    """The text with *** for the user and password of each URL in it, and for the values of its query."""
    return _URL.sub(lambda match: match[1] + _hidden(match[2]) + match[3], text)


def recorded(value: Any) -> Any:
    """`value` of a flag as files have it: strings, and entries of lists and objects, without secrets."""
    if isinstance(value, list):
        return [recorded(entry) for entry in value]
    if isinstance(value, dict):
        return {name: recorded(entry) for name, entry in value.items()}
    return without_secrets(value) if isinstance(value, str) else value


def _hidden(url: str) -> str:
    """A URL less its scheme."""
    authority = re.split(r"[/?#]", url, maxsplit=1)[0]
    is_whole = "@" in authority or _PLACE.fullmatch(authority)
    # A password may hold what should have been escaped, such as a slash: the last @ ends it then.
    end = (authority if is_whole else url).rfind("@")
    address, mark, query = (HIDDEN + url[end:] if end >= 0 else url).partition("?")
    return address + mark + "&".join(map(_hidden_value, query.split("&"))) if mark else address


def _hidden_value(part: str) -> str:
    name, is_pair, _ = part.partition("=")
    return f"{name}={HIDDEN}" if is_pair else HIDDEN
