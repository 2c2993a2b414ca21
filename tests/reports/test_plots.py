"""Drawings: text stays text, colours are the page's, and two on a page do not share identifiers."""

import re
import subprocess
import sys
from xml.etree import ElementTree

from dschat.reports.plots import SERIES, curves, plot


def test_text_is_text_and_colours_are_those_of_the_page():
    drawn = curves(
        "loss & more", [("train", [0, 1], [2.0, 1.0]), ("held out", [0, 1], [2.0, 1.5])], x="steps", y="nats"
    )
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawn.svg)
    assert {"steps", "nats", "train", "held out"} <= set(texts)
    assert "var(--series-0)" in drawn.svg
    assert "var(--series-1)" in drawn.svg
    assert not re.search(r"#0[12]0[12]0\d", drawn.svg)  # no stand-in is left
    assert not re.search(
        r"(?:fill|stroke): #(?!none)", drawn.svg
    )  # nor a colour for one of light and dark only
    assert ElementTree.fromstring(drawn.svg).get("aria-label") == "loss & more"


def test_identifiers_are_of_one_drawing_and_every_reference_has_its_target():
    first, second = (
        plot(name, lambda axes: axes.fill_between([0, 1], [0, 1], color=SERIES[2], alpha=0.4), x=name).svg
        for name in ("a", "b")
    )

    def ids(svg):
        return set(re.findall(r' id="([^"]+)"', svg))

    assert ids(first)
    assert not ids(first) & ids(second)
    assert set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', first)) <= {
        pair for name in ids(first) for pair in ((name, ""), ("", name))
    }


def test_the_bounds_of_what_is_healthy_are_drawn_where_they_are_within_sight():
    def dashes(bound):
        return curves("kl", [("kl", [0, 1], [0.0, 2.0])], healthy=(None, bound)).svg.count("stroke-dasharray")

    assert dashes(1.5) == 1
    assert dashes(50.0) == 0


def test_names_from_data_are_no_formulas_are_not_left_out_and_leave_room_for_the_drawing():
    names = ["$x_1$ and $\\frac{", "_hidden", "long" * 50, "\u202e"]
    drawn = curves("c", [(name, [0, 1], [0.0, 1.0]) for name in names], x="long" * 90, y="long" * 90).svg
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawn)
    assert {"$x_1$ and $\\frac{", "hidden", "long" * 9 + "l...", r"\u202e"} <= set(texts)


def test_a_drawing_is_the_same_each_time_and_asks_for_no_display():
    assert curves("a", [("x", [0], [1.0])]).svg == curves("a", [("x", [0], [1.0])]).svg


def test_matplotlib_is_imported_with_the_first_drawing_only():
    script = "import dschat.reports.plots, dschat.reports.page, sys; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_values_of_very_different_size_stand_on_a_logarithmic_axis():
    def ticks(*values: float) -> set[str]:
        return set(re.findall(r"<text[^>]*>([^<]*)</text>", curves("p", [("a", [0, 1, 2], values)]).svg))

    assert {"10", "100"} < ticks(900, 30, 3)
    assert {"200", "800"} < ticks(900, 300, 30)
