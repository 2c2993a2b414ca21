"""Which files of a folder are an export's: they alone are replaced and removed."""

import json
from pathlib import Path

import pytest

from dschat.runs.export_files import (
    RECORD,
    foreign_files,
    link_export,
    recorded,
    remove_export,
    replacing_export,
)

NAMES = ["adapter/adapter_model.safetensors", "config.json", "model.safetensors"]


def export(folder: Path, text: str = "a run's", names: list[str] = NAMES) -> Path:
    with replacing_export(folder) as temporary:
        for name in names:
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(text)
    return folder


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def test_an_export_says_which_files_are_its_own(tmp_path):
    export(tmp_path)
    files = json.loads((tmp_path / RECORD).read_text())["files"]
    assert sorted(files) == NAMES
    assert files["config.json"][0] == len("a run's")


def test_a_later_export_replaces_the_files_of_the_older_one_and_no_others(tmp_path):
    export(tmp_path)
    (tmp_path / "notes.txt").write_text("someone's")
    export(tmp_path, "another's", ["config.json"])
    assert contents(tmp_path) == {"config.json": "another's", "notes.txt": "someone's"}
    assert not (tmp_path / "adapter").exists()
    assert list(recorded(tmp_path)) == ["config.json"]


def test_an_export_that_fails_leaves_the_older_one_and_nothing_half_written(tmp_path):
    export(tmp_path)
    with pytest.raises(TypeError):
        export(tmp_path, text=3, names=["config.json"])
    assert contents(tmp_path) == dict.fromkeys(NAMES, "a run's")
    assert not list(tmp_path.glob(".export-*"))


def test_someone_elses_files_in_the_place_of_an_export_get_another_name(tmp_path, capsys):
    (tmp_path / "config.json").write_text("someone's")
    export(tmp_path)
    assert (tmp_path / "set-aside-config.json").read_text() == "someone's"
    assert (tmp_path / "config.json").read_text() == "a run's"
    assert "it is kept as set-aside-config.json" in capsys.readouterr().out


def test_foreign_files_are_told_with_the_reason(tmp_path):
    export(tmp_path)
    assert not list(foreign_files(tmp_path))
    (tmp_path / "model.safetensors").write_text("A run's")  # as long as before
    (tmp_path / "tokenizer.json").write_text("someone's")
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to(tmp_path / "tokenizer.json")
    (tmp_path / "notes.txt").write_text("no name that an export has")
    assert list(foreign_files(tmp_path)) == [
        "config.json (a symbolic link)",
        "model.safetensors (it was changed after a run had written it)",
        "tokenizer.json (no run wrote it)",
    ]


def test_an_export_of_a_version_without_records_is_known_by_its_manifest(tmp_path):
    (tmp_path / "config.json").write_text("an older run's")
    (tmp_path / "notes.txt").write_text("someone's")
    assert recorded(tmp_path) == {}
    (tmp_path / "manifest.json").write_text('{"golden_inputs": []}')
    assert sorted(recorded(tmp_path)) == ["config.json", "manifest.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"files": 3}', "[" * 100_000])
def test_a_damaged_record_names_no_files(text, tmp_path):
    (tmp_path / RECORD).write_text(text)
    assert recorded(tmp_path) == {}


def test_removing_an_export_leaves_other_files_and_their_folder(tmp_path):
    mixed, pure = export(tmp_path / "mixed"), export(tmp_path / "pure")
    (mixed / "notes.txt").write_text("someone's")
    (mixed / ".export-12345678").mkdir()  # of a run that was killed
    for folder in (mixed, pure, tmp_path / "gone"):
        remove_export(folder)
    assert [path.name for path in mixed.iterdir()] == ["notes.txt"]
    assert not pure.exists()


def test_a_link_to_a_folder_with_an_export_is_not_followed(tmp_path):
    export(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    remove_export(tmp_path / "link")
    assert sorted(contents(tmp_path / "elsewhere")) == NAMES


def test_files_are_linked_or_else_copied(tmp_path, monkeypatch):
    source = export(tmp_path / "source")
    (tmp_path / "linked").mkdir()
    link_export(source, tmp_path / "linked")
    assert (tmp_path / "linked" / "config.json").samefile(source / "config.json")

    def refuse(*_: object) -> None:
        raise OSError("no links on this disk")

    monkeypatch.setattr("os.link", refuse)
    (tmp_path / "copied").mkdir()
    link_export(source, tmp_path / "copied")
    assert contents(tmp_path / "copied") == contents(source)
    assert not (tmp_path / "copied" / "config.json").samefile(source / "config.json")
