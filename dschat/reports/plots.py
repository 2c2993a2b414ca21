"""Drawings for a page: matplotlib's SVG, with text kept as text and colours that follow light and dark."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

from markupsafe import escape

from dschat.console.text import printable
from dschat.reports.page import Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES = tuple(f"#01010{number}" for number in range(6))
"""The colours of curves: stand-ins, which the page gives colours for light and for dark."""
INK, LINE, PAPER = "#020201", "#020202", "#020203"
"""The stand-ins of text, of axes and grids, and of what a legend stands on."""
VARIABLES = {INK: "var(--ink)", LINE: "var(--line)", PAPER: "var(--paper)"} | {
    stand_in: f"var(--series-{number})" for number, stand_in in enumerate(SERIES)
}
INCHES = (4.6, 2.9)
LONGEST = 40
"""Characters of a label."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it is found, read aloud, and has the page's font
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.edgecolor": LINE,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.facecolor": PAPER,
    "legend.edgecolor": "none",
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
SPREAD = 50
"""How many times as large as the least value the largest is on a logarithmic axis."""


def plot(
    caption: str,
    draw: Callable[[Axes], None],
    *,
    x: str = "",
    y: str = "",
    note: str = "",
    legend: bool = False,
) -> Plot:
    """What `draw` draws with colours of `SERIES`; `x` and `y` name the axes, with their units.

    matplotlib is imported here, so that a program without a report does not wait for it.
    """
    from cycler import cycler
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**STYLE, "svg.hashsalt": caption, "axes.prop_cycle": cycler(color=SERIES)}):
        figure = Figure(figsize=INCHES, layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(label(x))
        axes.set_ylabel(label(y))
        draw(axes)
        if legend:
            axes.legend()
        file = StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return Plot(caption, _for_page(file.getvalue(), caption), note)


def curves(
    caption: str,
    series: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    *,
    x: str = "",
    y: str = "",
    note: str = "",
    healthy: tuple[float | None, float | None] = (None, None),
) -> Plot:
    """Lines of (name, xs, ys), with the bounds of what is `healthy` where there are such within sight.

    The axis is logarithmic for positive values of very different size.
    """

    def draw(axes: Axes) -> None:
        for name, xs, ys in series:
            axes.plot(xs, ys, label=label(name), marker="o" if len(xs) < 25 else "", markersize=3)
        values = [y for _, _, ys in series for y in ys]
        if values and 0 < SPREAD * min(values) < max(values):  # such as a perplexity that falls from 1,000
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        low, high = axes.get_ylim()
        for bound in healthy:
            if bound is not None and low <= bound <= high:
                axes.axhline(bound, color=SERIES[5], linestyle="--", linewidth=1)

    return plot(caption, draw, x=x, y=y, note=note, legend=len(series) > 1)


def label(text: str) -> str:
    """Text from elsewhere as matplotlib takes it: short, and none of it a formula or hidden."""
    text = printable(text.strip("_"), keep="")
    return (text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}...").replace("$", r"\$")


def _for_page(svg: str, caption: str) -> str:
    """The element without identifiers that another drawing has too, in the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([\w-]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"font: (\d+(?:\.\d+)?px) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns:xlink="[^"]*"| xmlns="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r"#0[12]020[0-9]|#01010[0-5]", lambda found: VARIABLES.get(found[0], found[0]), svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(printable(caption))}"', 1)
