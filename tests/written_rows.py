"""Rows in a file, for tests: what reading makes of them, and what it finds on the way."""

import json

from dschat.data.findings import Findings
from dschat.data.reading import Format, read_comparisons
from dschat.data.sources import open_source

PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}
EXAMPLE = {"prompt": "p", "completion": "c"}


def reading(tmp_path, *rows, form=None):
    """The comparisons of a file of these rows, and what is found on the way."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, findings = open_source(str(path)), Findings()
    found = list(read_comparisons(source, source.training, form or Format(), findings))
    return found, findings


def told(tmp_path, *rows, form=None):
    """The lines that report what is found on the way."""
    return "\n".join(reading(tmp_path, *rows, form=form)[1].lines())


def read_part(path, part="training", findings=None, form=None):
    """The comparisons of a part of a source."""
    source = open_source(str(path))
    found = Findings() if findings is None else findings
    return list(read_comparisons(source, getattr(source, part), form or Format(), found))


def lines(rows):
    """The rows as lines of JSON."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
