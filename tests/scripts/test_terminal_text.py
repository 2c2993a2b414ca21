"""Text from data and models is text on a terminal, wherever it is printed: it has no effects."""

from io import StringIO
from types import SimpleNamespace

import pytest
import rich.console

from dschat.console.text import PLAIN, markdown_table
from dschat.rlhf.samples import samples_table
from scripts import compare, inspect_data

HOSTILE = "[red]x[/] [/] :smile: \x1b[2J\x1b]0;title\x07\x08\r\x9b31m\u202e end"
SHOWN = r"[red]x[/] [/] :smile: \x1b[2J\x1b]0;title\x07\x08\r\x9b31m\u202e end"


@pytest.fixture
def terminal(monkeypatch) -> StringIO:
    """What rich prints, as on a terminal that shows colours and is wide."""
    shown = StringIO()

    def console(**settings) -> rich.console.Console:
        return RichConsole(file=shown, force_terminal=True, width=400, **settings)

    RichConsole = rich.console.Console
    monkeypatch.setattr(rich.console, "Console", console)
    return shown


def test_inspect_data(terminal):
    texts = {"name": HOSTILE, "facts": [("rows", HOSTILE)], "warnings": [HOSTILE], "bad_rows": []}
    examples = [{HOSTILE: [(HOSTILE, True)]}]
    report = inspect_data.Report(**texts, stops=False, lengths=[], examples=examples)
    inspect_data.show(report, rich.console.Console(**PLAIN), 64)
    assert terminal.getvalue().count(SHOWN) == 5
    assert "\x1b[2J" not in terminal.getvalue()


def test_compare(terminal):
    args = SimpleNamespace(num_shown=1, demo_task=False, reference=None)
    asked = compare.Asked([HOSTILE], "", [{}])
    found = compare.Comparison(asked, {"[b]one": [HOSTILE]}, {"[b]one": {"answer_length": 1.0}})
    found.notes.append(HOSTILE)
    compare.show(args, found)
    assert terminal.getvalue().count(SHOWN) == 3
    assert "[b]one" in terminal.getvalue()


def test_samples():
    row = {"prompt": HOSTILE, "answer": HOSTILE, "score": 1.0, "kl": 0.5, "length": 2}
    shown = samples_table(1, [row])
    assert shown.count("\\x1b") == 4
    assert "\x1b" not in shown
    assert "\x1b" not in markdown_table([row])
