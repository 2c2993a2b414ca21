import csv
import gzip
import io

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dschat.data.cells import BadRow
from dschat.data.files import file_rows, sound_rows
from dschat.errors import UserError


def rows(tmp_path, content, name="x.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [
        (place.removeprefix(f"{tmp_path}/"), row) for place, row in sound_rows(file_rows(path, "--data_path"))
    ]


def test_rows_have_the_names_of_the_first_line_and_the_line_they_begin_on(tmp_path):
    content = 'prompt,chosen,rejected\n"a, ""b""\n\nc",yes,\n\nd,2,"  "\r\n'
    assert rows(tmp_path, "\ufeff" + content) == [
        ("x.csv:2", {"prompt": 'a, "b"\n\nc', "chosen": "yes", "rejected": None}),
        ("x.csv:6", {"prompt": "d", "chosen": "2", "rejected": "  "}),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", "a,b\n1,x;y\n"),
        ("x.csv", "a;b\n1;x;y\n".replace("x;y", '"x;y"')),
        ("x.csv", "a\tb\n1\tx;y\n"),
        ("x.tsv", "a\tb\n1\tx;y\n"),
        ("x.TSV", '"a"\t"b"\r\n"1"\t"x;y"'),
    ],
)
def test_the_first_line_tells_what_separates_fields(tmp_path, name, content):
    assert rows(tmp_path, content, name) == [(f"{name}:2", {"a": "1", "b": "x;y"})]


def test_one_column_and_long_fields_and_packed_tables_are_read(tmp_path):
    assert rows(tmp_path, "prompt\nWhy?\n") == [("x.csv:2", {"prompt": "Why?"})]
    long = "x" * 200_000
    packed = gzip.compress(f"prompt,b\n{long},1\n".encode())
    assert rows(tmp_path, packed, "x.csv.gz") == [("x.csv.gz:2", {"prompt": long, "b": "1"})]


def test_columns_without_a_name_are_numbered(tmp_path):
    assert rows(tmp_path, ",prompt,\n0,a,1\n") == [
        ("x.csv:2", {"__index_level_0__": "0", "prompt": "a", "column 3": "1"})
    ]


def test_rows_after_one_with_too_many_fields_are_read(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n1,2,3\n4,5\n")
    found = [row for _, row in file_rows(tmp_path / "x.csv", "--data_path")()]
    assert [found[0], found[2]] == [{"a": "1", "b": "2"}, {"a": "4", "b": "5"}]
    assert isinstance(found[1], BadRow)


@given(
    table=st.lists(st.lists(st.text(st.characters(codec="utf-8")), min_size=2, max_size=2)),
    delimiter=st.sampled_from(",;\t"),
    end=st.sampled_from(["\n", "\r\n"]),
)
@settings(suppress_health_check=list(HealthCheck))
def test_what_a_writer_of_tables_writes_is_read(tmp_path, table, delimiter, end):
    text = io.StringIO()
    # By itself Python before 3.13 leaves a carriage return without quotes.
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([["a", "b"], *table])
    found = [row for _, row in rows(tmp_path, text.getvalue())]
    assert found == [{"a": a or None, "b": b or None} for a, b in table]


@pytest.mark.parametrize("content", ["", "\n\n", "prompt,chosen\n"])
def test_a_table_without_rows_gives_none(tmp_path, content):
    assert rows(tmp_path, content) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n1,2,3\n", r"x\.csv:3: the row has 3 fields, but the first line names 2 columns.*a comma"),
        ("a,b\n\n1\n", r"x\.csv:3: the row has 1 fields, but the first line names 2"),
        ('a,b\n1,2\n"x,2\n3,4\n', r"x\.csv:3: the row cannot be read \(unexpected end of data\)"),
        ('a,b\n1,2\n"x"y,2\n', r"x\.csv:3: the row cannot be read .*double quotes"),
        ("a,b\r1,2\r", r"x\.csv:1: .*Lines end with a carriage return alone; save the file with line feeds"),
        ("a,b,a\n1,2,3\n", r"x\.csv:1: several columns are called a; rename"),
        (b"a,b\n1,2\n\xff,3\n", r"x\.csv:3: the text is not UTF-8"),
        (b"\xff\xfea\0,\0b\0", r"x\.csv:1: the text is not UTF-8"),
    ],
)
def test_what_is_no_table_is_named_by_its_line(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        rows(tmp_path, content)
