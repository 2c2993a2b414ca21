import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dschat.data import files
from dschat.data.cells import BadRow
from dschat.data.files import file_rows, sound_rows
from dschat.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def rows_of(path):
    return [row for _, row in sound_rows(file_rows(path, "--data_path"))]


def places(path):
    return [place for place, _ in file_rows(path, "--data_path")()]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """One path that many examples write to."""
    return tmp_path_factory.mktemp("files") / "x.json"


@pytest.mark.slow
@given(
    rows=st.lists(VALUES, max_size=6),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
    mark=st.booleans(),
)
@example(rows=[1.5, -2e300, 10**30, "é\\"], chunk=1, indent=None, ascii_only=False, mark=True)
@settings(max_examples=300)
def test_a_list_is_what_json_makes_of_it_whatever_the_chunks(file, rows, chunk, indent, ascii_only, mark):
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    file.write_bytes(("\ufeff" * mark + text).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "READ_AT_ONCE", chunk)
        assert rows_of(file) == json.loads(text)


@pytest.mark.parametrize("number", ["1.5", "1e5", "1e+5", "-1.25E-3", "12345678901234567890"])
@pytest.mark.parametrize("chunk", range(1, 8))
def test_a_number_is_not_cut_where_the_window_ends(tmp_path, monkeypatch, number, chunk):
    monkeypatch.setattr(files, "READ_AT_ONCE", chunk)
    (tmp_path / "x.json").write_text(f"[{number},{number}]")
    assert rows_of(tmp_path / "x.json") == [json.loads(number)] * 2


@pytest.mark.slow
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=4), VALUES, max_size=3), max_size=6), crlf=st.booleans()
)
@settings(max_examples=100)
def test_lines_are_what_json_makes_of_each(file, rows, crlf):
    end = "\r\n" if crlf else "\n"
    # U+2028 and the like end a line for str.splitlines, but not in JSON Lines.
    text = "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)
    file.write_bytes(text.encode())
    assert rows_of(file) == rows


@pytest.mark.parametrize("chunk", range(1, 7))
@pytest.mark.parametrize("form", ["lines", "list"])
def test_letters_of_many_bytes_survive_the_border_of_a_chunk(tmp_path, monkeypatch, chunk, form):
    monkeypatch.setattr(files, "READ_AT_ONCE", chunk)
    row = {"Grüße": "好😀", "\u2028": "é" * 5}
    text = json.dumps([row, row] if form == "list" else row, ensure_ascii=False)
    path = tmp_path / "x.json.gz"
    path.write_bytes(gzip.compress(("\ufeff" + text).encode()))
    assert rows_of(path) == [row] * (2 if form == "list" else 1)


@pytest.mark.parametrize("form", ["{}\n", "[{}]"])
def test_a_row_of_2_megabytes_is_read(tmp_path, form):
    row = {"prompt": "é" * 10**6, "answers": ['"\\'] * 1000}
    (tmp_path / "x.json").write_text(form.replace("{}", json.dumps(row)))
    assert rows_of(tmp_path / "x.json") == [row]


MEASURE = """
import sys, tracemalloc
from pathlib import Path
from dschat.data.files import file_rows

tracemalloc.start()
number = sum(len(row["text"]) for _, row in file_rows(Path(sys.argv[1]), "--data_path")())
print(number, tracemalloc.get_traced_memory()[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["list", "lines"])
def test_100_megabytes_are_read_in_16(tmp_path, form):
    path = tmp_path / "x.json"
    with path.open("w") as out:
        row = json.dumps({"text": "a" * 10_000})
        out.write("[" if form == "list" else "")
        for number in range(10_000):
            out.write((",\n" if form == "list" else "\n") * (number > 0) + row)
        out.write("]" if form == "list" else "")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURE, str(path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    characters, peak = map(int, run.stdout.split())
    assert characters == 10**8
    assert peak < 16 << 20


def test_rows_carry_the_line_they_begin_on(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "READ_AT_ONCE", 5)
    (tmp_path / "list.json").write_text('\n[{"a":\n1},\n\n{"b": "x\\ny"}, {"c": 2}\n, 4]')
    (tmp_path / "lines.jsonl").write_text('\n{"a": 1}\n\r\n{"b": 2}')
    assert [place.rpartition(":")[2] for place in places(tmp_path / "list.json")] == ["2", "5", "5", "6"]
    assert [place.rpartition(":")[2] for place in places(tmp_path / "lines.jsonl")] == ["2", "4"]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ('[\n{"a": 1},\n{"a": oops}]', 3, "Expecting value"),
        ('[{"a": "never ended\n}]', 1, "Invalid control character"),
        ('[\n\n{"a": "never ended}]', 3, "Unterminated string"),
        ('[{"a": 1}\n\n{"b": 2}]', 3, "a comma or the closing bracket is missing"),
        ('[{"a": 1},\n\n]', 3, "there is a comma, but no element"),
        ('[{"a": 1}]\n\n\n[2]', 4, "there is more text after the list"),
        ('[\n{"a"\n:\n1\n "b": 2}]', 5, "Expecting ',' delimiter"),
        ("[\n", 2, "Expecting value"),
    ],
)
def test_a_fault_in_a_list_is_named_by_its_line_whatever_the_chunks(
    tmp_path, monkeypatch, chunk, text, line, problem
):
    monkeypatch.setattr(files, "READ_AT_ONCE", chunk)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError) as error:
        rows_of(tmp_path / "x.json")
    assert f"x.json:{line}: not a JSON list of objects ({problem}" in str(error.value)


@pytest.mark.parametrize("chunk", [1, 2, 3, 1 << 20])
@pytest.mark.parametrize(
    ("content", "line"),
    [(b'[\n"\xff"]', 2), (b'["a",\n\n"b\xc3', 3), (b'["a",\n"\xe5\xa5\n"]', 2)],
)
def test_bytes_that_are_no_utf8_are_named_by_their_line(tmp_path, monkeypatch, chunk, content, line):
    monkeypatch.setattr(files, "READ_AT_ONCE", chunk)
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.json:{line}: the text is not UTF-8"):
        rows_of(tmp_path / "x.json")


@pytest.mark.parametrize("indent", [2, "\t"])
def test_one_object_over_many_lines_says_what_it_is_and_what_to_do(tmp_path, indent):
    (tmp_path / "x.json").write_text(json.dumps({"data": [{"prompt": "p"}]}, indent=indent))
    with pytest.raises(UserError) as error:
        rows_of(tmp_path / "x.json")
    assert "x.json:1: not a JSON object on one line" in str(error.value)
    assert "It goes on below: give each object on one line, or one list of objects" in str(error.value)
    assert str(error.value).endswith('{"data": [...]}, save that list alone.')


def test_a_last_line_that_is_cut_off_is_no_object_over_many_lines(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1}\n{"a": ')
    with pytest.raises(UserError, match=r"x\.json:2: not a JSON object on one line .*\. Correct the row"):
        rows_of(tmp_path / "x.json")


def test_the_lines_after_one_that_cannot_be_read_are_read(tmp_path):
    lines = [b'{"a": 1}', b'{"a": ', b'{"a": 2}', b"\xff", b'{"a": 3}', b'{"a": ' + b"9" * 5000 + b"}", b"4"]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    rows = [row for _, row in file_rows(tmp_path / "x.jsonl", "--data_path")()]
    assert [isinstance(row, BadRow) for row in rows] == [False, True, False, True, False, True, False]
    assert (rows[0], rows[4], rows[6]) == ({"a": 1}, {"a": 3}, 4)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000])
def test_json_that_is_nested_too_deep_is_named(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(
        UserError, match=r"x\.json:1: .*JSON cannot be read \(it is nested too deep\)\. Correct"
    ):
        rows_of(tmp_path / "x.json")


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_a_number_of_thousands_of_digits_is_named(tmp_path, name):
    text = '{"a": ' + "9" * 5000 + "}"
    (tmp_path / name).write_text(f"[{text}]" if name == "x.json" else text)
    with pytest.raises(UserError, match=rf"{name}:1: .*a number of thousands of digits"):
        rows_of(tmp_path / name)


@pytest.mark.parametrize("blank", ["\x0c", "\x0b"])
def test_what_json_does_not_count_as_blank_begins_no_list(tmp_path, blank):
    (tmp_path / "x.json").write_text(blank + '[{"a": 1}]')
    assert rows_of(tmp_path / "x.json") == [[{"a": 1}]]
