"""Pages: what they show is text, whatever it holds, and in a browser they ask for nothing and fit a phone."""

import pytest
from browser import PALE

from dschat.errors import UserError
from dschat.reports.page import (
    Plots,
    Samples,
    Section,
    Table,
    Text,
    Verdict,
    Warnings,
    page,
    render,
    write_page,
)
from dschat.reports.plots import curves

HOSTILE = "</pre><script>document.title = 'owned'</script><img src=https://example.com/x onerror=alert(1)>"
LONG = "/a/very/long/path/" + 30 * "without_a_place_to_break_"


def hostile_page() -> str:
    plot = curves(
        HOSTILE, [(HOSTILE, [0, 1, 2], [1.0, 3.0, 2.0]), ("b", [0, 2], [0.0, 1.0])], x=LONG, y="nats"
    )
    blocks = [
        Verdict(HOSTILE, LONG, "bad"),
        Warnings([HOSTILE, LONG]),
        Table([[LONG, "1.000 (0.900 to 1.000)", "12345"]], columns=[HOSTILE, "accuracy", "pairs"], title="T"),
        Table([["name", LONG]]),
        Section(HOSTILE, [Plots([plot, plot]), Section("more", [Text(HOSTILE, faint=True)], collapsed=True)]),
        Section(
            "samples",
            [Samples("one", HOSTILE, [(HOSTILE, LONG, "note"), ("b", "\u202e \ud800 \x1b[2J", "")])],
        ),
    ]
    return page(HOSTILE, blocks, lead=LONG)


def test_text_of_data_and_models_is_text_and_what_would_steer_it_is_shown():
    html = hostile_page()
    assert "<script" not in html
    assert "<img" not in html
    assert r"\u202e \ud800 \x1b[2J" in html
    assert html.count("owned") == html.count("&lt;script&gt;") > 8


def test_a_template_of_elsewhere_extends_the_base_and_a_misspelt_value_is_an_error():
    text = '{% extends "base.html.jinja" %}\n{% block content %}<p>{{ said }}</p>{% endblock %}'
    assert "<p>&lt;i&gt;</p>" in render(text, title="t", said="<i>")
    with pytest.raises(Exception, match="'said' is undefined"):
        render(text, title="t")


def test_a_page_that_cannot_be_written_names_its_flag(tmp_path):
    with pytest.raises(UserError, match=r"--output .*nowhere/p.html cannot be written \(No such file"):
        write_page(tmp_path / "nowhere" / "p.html", "", "--output")
    write_page(tmp_path / "p.html", hostile_page())  # halves of surrogate pairs too


def test_in_a_browser_a_page_asks_for_nothing_fits_a_phone_and_follows_light_and_dark(browser, tmp_path):
    path = tmp_path / "page.html"
    write_page(path, hostile_page())
    browser.check(path, "hostile")
    colours = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector("
    colours += "'svg text')).fill]"
    for scheme, expected in (
        ("light", ["rgb(255, 255, 255)", "rgb(28, 32, 36)"]),
        ("dark", ["rgb(13, 17, 23)", "rgb(230, 237, 243)"]),
    ):
        browser.emulate(scheme)
        assert browser.evaluate(colours) == expected
    assert browser.evaluate("document.title") == HOSTILE
    # and the check can fail: a request, a broken script, what is too wide and what is too pale are seen
    path.write_text(
        "<img src=missing.png><script>undefined_name()</script><div style='width: 900px'>x</div>"
        "<p style='color: #999'>pale</p><p style='color: #777; background: #7778'>grey</p>"
    )
    browser.open(path.as_uri())
    assert len(browser.requests()) == 2
    assert len(browser.problems()) == 2
    assert browser.overflow() > 400
    assert [text for text, _ in browser.evaluate(PALE)] == ["pale", "grey"]


def test_lines_end_after_parts_of_a_name_in_cells_and_never_within_a_flag():
    html = page("t", [Table([["eval_score/a&b", "-1e-07"]], columns=["", "n"]), Text("below --max_kl <i>")])
    assert "<td>eval_<wbr>score/<wbr>a&amp;b</td>" in html
    assert '<td class="number">-1e-07</td>' in html
    assert 'below <span class="flag">--max_kl</span> &lt;i&gt;' in html
