"""Text from data and models, made safe for a terminal."""

import re
from typing import Any

PLAIN = {"markup": False, "emoji": False, "highlight": False}
"""For rich's Console: text from data and models is text, also where it reads like rich's markup."""


STEERING = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)
"""Characters that move the cursor, reorder text or hide it, and halves of surrogate pairs."""


def printable(text: str, keep: str = "\n\t") -> str:
    """Text from data or models with its `STEERING` characters escaped, all but those of `keep`."""
    return STEERING.sub(lambda c: c[0] if c[0] in keep else c[0].encode("unicode_escape").decode(), text)


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as a table in Markdown, in which their text is text."""
    cells = [[_cell(value) for value in row.values()] for row in ({name: name for name in rows[0]}, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _cell(value: Any) -> str:
    shown = f"{value:.4g}" if isinstance(value, float) else printable(str(value))
    escaped = re.sub(r"([\\|`*_<>\[\]#])", r"\\\1", shown)
    return escaped.replace("\n", "<br>")
