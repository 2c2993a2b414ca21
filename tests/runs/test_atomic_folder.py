"""Folders are complete or not there, and every kind of damage is told."""

import json
import stat
from pathlib import Path

import pytest

from dschat.runs.atomic_folder import (
    COMPLETE,
    damage,
    facts_of,
    flushed,
    names_of_files,
    private_files,
    put_in_place,
    write_json,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of two files that is complete, with a fact."""
    return finished(tmp_path, {"a": "one", "below/b": "two"}, step=7)


def finished(root: Path, contents: dict[str, str], **facts: int) -> Path:
    temporary, target = root / ".saving", root / "target"
    for name, text in contents.items():
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        (temporary / name).write_text(text)
    put_in_place(temporary, target, flushed(temporary, names_of_files(temporary)), **facts)
    return target


def test_a_folder_in_its_place_is_complete_and_says_what_it_was_given(folder):
    assert sorted(path.name for path in folder.parent.iterdir()) == ["target"]
    facts = facts_of(folder)
    assert facts["step"] == 7
    assert sorted(facts["files"]) == ["a", "below/b"]
    assert facts["files"]["a"][0] == 3  # bytes of "one"
    assert damage(folder) is None


def test_the_mark_is_none_of_the_files(folder):
    assert (folder / COMPLETE).is_file()
    assert names_of_files(folder) == ["a", "below/b"]


def test_an_older_folder_is_replaced_whole(folder):
    finished(folder.parent, {"c": "three"}, step=8)
    assert names_of_files(folder) == ["c"]
    assert facts_of(folder)["step"] == 8
    assert sorted(path.name for path in folder.parent.iterdir()) == ["target"]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a", None, "a is missing"),
        ("below/b", "three", "below/b has 5 bytes instead of 3"),
        ("a", "onE", "a is corrupted: its checksum is not the one that was saved"),
        (COMPLETE, None, "it was never finished, or its complete.json is corrupted"),
        (COMPLETE, "{", "it was never finished, or its complete.json is corrupted"),
        (COMPLETE, "[]", "it was never finished, or its complete.json is corrupted"),
    ],
)
def test_damage_is_told_by_file(name, text, problem, folder):
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)
    assert damage(folder) == problem


def test_a_mark_that_was_edited_is_no_mark(folder):
    mark = json.loads((folder / COMPLETE).read_text())
    (folder / COMPLETE).write_text(json.dumps({**mark, "step": 9}))
    assert facts_of(folder) is None


def test_a_file_that_was_added_is_no_damage(folder):
    (folder / "notes.txt").write_text("someone's")
    assert damage(folder) is None


def test_private_files_are_their_owners_alone_and_later_ones_as_before(tmp_path):
    def mode(name: str) -> int:
        (tmp_path / name).touch()
        return stat.S_IMODE((tmp_path / name).stat().st_mode)

    before = mode("before")
    with private_files():
        assert mode("inside") == 0o600
    assert mode("after") == before


def test_json_that_cannot_be_written_leaves_the_older_file(tmp_path):
    path = tmp_path / "state.json"
    write_json(path, {"step": 1})
    with pytest.raises(TypeError):
        write_json(path, {"step": object()})
    assert json.loads(path.read_text()) == {"step": 1}
    write_json(path, {"step": 2})
    assert json.loads(path.read_text()) == {"step": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
