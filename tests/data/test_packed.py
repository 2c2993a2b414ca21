"""Packed files give the bytes that were packed, or the error names the damage."""

import bz2
import gzip
import lzma

import pyarrow as pa
import pytest
from written_rows import lines
from written_rows import read_part as read

from dschat.data.packed import open_unpacked, packing
from dschat.errors import UserError

ROWS = [
    {"prompt": "Grüße 😀", "chosen": "a\u2028b", "rejected": "c"},
    {"prompt": "p2", "chosen": "a2", "rejected": "r2"},
]


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(lines(ROWS * 50).encode())[:-20], b"\x1f\x8b\x08"]
)
def test_a_damaged_gzip_file_is_named(tmp_path, content):
    (tmp_path / "x.jsonl.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.jsonl\.gz: the gzip file is damaged"):
        read(tmp_path / "x.jsonl.gz")


PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", PACK)
def test_what_was_packed_is_read_back_in_pieces(tmp_path, suffix):
    data = bytes(range(256)) * 10
    (tmp_path / "x").write_bytes(PACK[suffix](data))
    with open_unpacked(tmp_path / "x", suffix) as file:
        assert file.read(3) + file.read() == data


@pytest.mark.parametrize(
    ("name", "suffix"), [("a.jsonl.GZ", ".gz"), ("a.gz.json", ""), ("zst", ""), ("", "")]
)
def test_the_suffix_tells_how_a_file_is_packed(name, suffix):
    assert packing(name) == suffix
