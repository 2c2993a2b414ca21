"""What of a URL is hidden in files and messages."""

import pytest

from dschat.arguments import without_secrets
from dschat.arguments.secrets import recorded


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://host:80/a@b", "http://host:80/a@b"),  # no password
        ("http://us:p/w@host/", "http://***@host/"),  # what should have been escaped
        ("http://us:p?w=#@host/?a=b", "http://***@host/?a=***"),
        ("http://us:p'w@host/", "http://***@host/"),
        (
            "see 'HTTPS://us:pw@[::1]:8/' and http://us@host.",
            "see 'HTTPS://***@[::1]:8/' and http://***@host.",
        ),
        ("hub://us:pw@host", "hub://us:pw@host"),  # another kind of name
    ],
)
def test_what_of_a_url_is_shown(text, shown):
    assert without_secrets(text) == shown


def test_values_are_recorded_without_secrets_whatever_their_type():
    assert recorded(["http://us:pw@host", "b"]) == ["http://***@host", "b"]
    assert recorded("https://host/?token=t") == "https://host/?token=***"
    assert recorded({"a": ["http://us:pw@host"]}) == {"a": ["http://***@host"]}
    for value in (3, 0.5, True, None):
        assert recorded(value) is value
