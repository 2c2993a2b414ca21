"""Fingerprints change with content and with nothing else."""

import pytest

from dschat.errors import UserError
from dschat.fingerprint import CHUNK, files_fingerprint, fingerprint


def test_fingerprints_stay_the_same_from_version_to_version():
    # They name caches and verify checkpoints and exports on disk. This one is xxh3_128 of '{"a": 1}'.
    assert fingerprint({"a": 1}) == "8f1c29f50aa952dbd475f930065b4b4f"


def test_values_count_and_the_order_of_keys_does_not():
    assert fingerprint({"a": 1, "b": [2, None]}) == fingerprint({"b": [2, None], "a": 1})
    different = [{"a": 1}, {"a": 2}, {"a": "1"}, {"b": 1}, {"a": [1]}, {"a": 1, "b": 1}, {}]
    assert len({fingerprint(parts) for parts in different}) == len(different)


def test_bytes_and_order_of_files_count_and_names_do_not(tmp_path):
    one, other, copy = (tmp_path / name for name in ("one", "other", "copy"))
    one.write_bytes(b"ab")
    other.write_bytes(b"c")
    copy.write_bytes(b"ab")
    assert files_fingerprint([one, other]) == files_fingerprint([copy, other])
    assert files_fingerprint([one, other]) != files_fingerprint([other, one])
    assert files_fingerprint([one]) == "8ad1ff24e59b75968c0a049403618fa5"


def test_where_one_file_ends_counts(tmp_path):
    paths = [tmp_path / str(number) for number in range(4)]
    for path, content in zip(paths, (b"ab", b"c", b"a", b"bc"), strict=True):
        path.write_bytes(content)
    assert files_fingerprint(paths[:2]) != files_fingerprint(paths[2:])


def test_files_longer_than_what_is_read_at_once_are_read_to_the_end(tmp_path):
    (tmp_path / "a").write_bytes(bytes(CHUNK + 1))
    (tmp_path / "b").write_bytes(bytes(CHUNK) + b"\1")
    assert files_fingerprint([tmp_path / "a"]) != files_fingerprint([tmp_path / "b"])


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone: it cannot be read \(No such file or directory\)"):
        files_fingerprint([tmp_path / "gone"])
