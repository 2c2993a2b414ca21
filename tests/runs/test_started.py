"""What a run notes of its start."""

import re
import sys

from dschat.runs import started


def test_the_command_is_noted_without_passwords_and_the_commit_of_the_checkout(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "--reward_endpoint", "http://me:secret@host/score", "a b"])
    found = started.how_started()
    assert found["command"].endswith("'a b'")
    assert "secret" not in str(found)
    assert found["versions"]["python"] == sys.version.split()[0]
    assert {"torch", "transformers"} <= set(found["versions"])
    if (started.ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{12}\+?", found["commit"])


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(started, "ROOT", tmp_path)
    assert started.how_started()["commit"] is None
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", "")
    assert started.how_started()["commit"] is None


def test_a_checkout_that_is_not_installed_has_no_version_of_its_own(monkeypatch):
    def version(name):
        if name == "dschat":
            raise started.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(started, "version", version)
    assert started.installed_versions(("dschat", "torch")) == {"torch": "1"}
