"""A report as one HTML file that needs nothing else: blocks in, a page out. No block knows HTML.

The page has its styles in itself, asks for nothing, runs no scripts, and follows light and dark. What it
shows may come from data and models: all text is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import jinja2
from markupsafe import Markup, escape

from dschat.console.text import printable
from dschat.errors import UserError

Level = Literal["good", "warning", "bad", "neutral"]
ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
    finalize=lambda value: printable(value) if type(value) is str else value,
)
"""Templates may extend base.html.jinja. Characters that steer or reorder text are shown as escapes."""


def _wrapped(pattern: str, markup: str, text: str) -> Markup:
    """The text as HTML, with the markup of ours where the pattern matches, which says where lines may end."""
    return Markup(re.sub(pattern, markup, str(escape(printable(text)))))


ENVIRONMENT.filters["cell"] = partial(_wrapped, "[_/]", r"\g<0><wbr>")
ENVIRONMENT.filters["prose"] = partial(
    _wrapped, r"--\w{1,40}|\(?[-+]?\d\S* to \S+", r'<span class="flag">\g<0></span>'
)


@dataclass(frozen=True)
class Verdict:
    """What a report comes to."""

    kind: ClassVar = "verdict"
    words: str
    reason: str = ""
    level: Level = "neutral"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar = "text"
    text: str
    faint: bool = False


@dataclass(frozen=True)
class Warnings:
    """Lines that deserve a look."""

    kind: ClassVar = "warnings"
    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of cells. With `columns`, their headings, all cells but the first of a row are numbers."""

    kind: ClassVar = "table"
    rows: Sequence[Sequence[str]]
    columns: Sequence[str] = ()
    title: str = ""


@dataclass(frozen=True)
class Plot:
    """A drawing, made by `plots.plot`."""

    caption: str
    svg: str
    """Our own markup, which is not escaped."""
    note: str = ""


@dataclass(frozen=True)
class Plots:
    """Drawings, as many beside each other as there is room for."""

    kind: ClassVar = "plots"
    plots: Sequence[Plot]


@dataclass(frozen=True)
class Samples:
    """Texts side by side, each with a name and a note: answers to one prompt."""

    kind: ClassVar = "samples"
    title: str
    prompt: str
    texts: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Section:
    """Blocks under a heading, or `collapsed` behind it."""

    kind: ClassVar = "section"
    title: str
    blocks: Sequence[Block] = field(default_factory=list)
    collapsed: bool = False


Block = Verdict | Text | Warnings | Table | Plots | Samples | Section


def page(title: str, blocks: Sequence[Block], *, lead: str = "") -> str:
    """The HTML of a report."""
    return render("page.html.jinja", title=title, blocks=blocks, lead=lead)


def render(template: str, **values: Any) -> str:
    """The HTML that a template makes of the values: one of this folder, or a text that extends one of it."""
    found = ENVIRONMENT.from_string(template) if "\n" in template else ENVIRONMENT.get_template(template)
    return found.render(**values)


def write_page(path: Path, html: str, flag: str = "") -> None:
    """Write a report. Raises `UserError`, which names the flag, where that fails."""
    try:
        path.write_text(html, encoding="utf-8")
    except OSError as error:
        name = f"{flag} {path}".strip()
        raise UserError(f"{name} cannot be written ({error.strerror}); name another file.") from error
