import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dschat.data.cache import cache_folder, cached, lookup
from dschat.errors import UserError
from dschat.fingerprint import files_fingerprint, fingerprint

ROOT = Path(__file__).resolve().parents[2]

BUILDER = """
import sys, time
from pathlib import Path
from dschat.data.cache import cached

def build(folder):
    with open(sys.argv[1] + "/builds", "a") as file:
        file.write("built\\n")
    time.sleep(0.5)
    (folder / "result").write_text("whole")

print((cached(Path(sys.argv[1]), "key", build) / "result").read_text())
"""


def test_a_result_is_built_once_and_found_afterwards(tmp_path):
    builds = []
    for _ in range(2):
        folder = cached(tmp_path, "key", lambda place: builds.append((place / "x").write_text("1")))
        assert (folder / "x").read_text() == "1"
    assert len(builds) == 1


def test_what_is_kept_is_told_without_building_it(tmp_path):
    assert lookup(tmp_path, "key") is None
    folder = cached(tmp_path, "key", lambda place: (place / "x").write_text("12"))
    assert lookup(tmp_path, "key") == folder
    (folder / "x").write_text("1")
    assert lookup(tmp_path, "key") is None, "it was cut short"


@pytest.mark.slow
def test_processes_that_start_together_build_once(tmp_path):
    command = [sys.executable, "-c", BUILDER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    runs = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [run.communicate(timeout=60)[0] for run in runs] == ["whole\n"] * 3
    assert (tmp_path / "builds").read_text() == "built\n"


def test_a_failed_build_leaves_nothing_and_the_next_one_succeeds(tmp_path):
    def fail(folder):
        (folder / "half").write_text("")
        raise UserError("bad input")

    with pytest.raises(UserError, match="bad input"):
        cached(tmp_path, "key", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]
    assert cached(tmp_path, "key", lambda folder: None).is_dir()


def test_what_a_killed_build_left_is_cleared_away(tmp_path):
    (tmp_path / "key.unfinished-abc").mkdir()
    cached(tmp_path, "key", lambda folder: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.lock"]


def test_an_entry_that_lost_a_file_or_part_of_it_is_built_again(tmp_path):
    def build(folder):
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("whole")

    for damage in (
        lambda file: file.unlink(),
        lambda file: file.write_text("who"),
        lambda file: (file.parents[1] / "files.json").write_text('{"sub/x": '),
    ):
        damage(cached(tmp_path, "key", build) / "sub" / "x")
        assert (cached(tmp_path, "key", build) / "sub" / "x").read_text() == "whole"


def test_a_file_that_came_later_does_no_harm(tmp_path):
    builds = []
    for _ in range(2):
        folder = cached(tmp_path, "key", lambda place: builds.append((place / "x").write_text("1")))
        (folder / "more").write_text("")
    assert len(builds) == 1


def test_a_fingerprint_follows_values_and_not_their_order():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1, "b": [2]}) != fingerprint({"a": 1, "b": [3]})


def test_the_fingerprint_of_files_follows_their_bytes_and_where_each_ends(tmp_path):
    def of(*contents):
        paths = [tmp_path / str(time.monotonic_ns()) for _ in contents]
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        return files_fingerprint(paths)

    assert of(b"ab", b"c") == of(b"ab", b"c")
    assert len({of(b"ab", b"c"), of(b"a", b"bc"), of(b"abc"), of(b"c", b"ab"), of()}) == 5


def test_the_default_folder_is_in_the_users_cache_and_private(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    folder = cache_folder(None)
    assert folder == tmp_path / "xdg" / "dschat"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_without_xdg_the_default_is_below_dot_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / ".cache" / "dschat"


def test_a_folder_that_cannot_be_written_names_the_flag(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--data_output_path .*file/x cannot be written"):
        cache_folder(str(tmp_path / "file" / "x"))
