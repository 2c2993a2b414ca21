"""The hub is asked for what the entry names, and its refusals say what to write."""

import time

import datasets
import pytest
from huggingface_hub import constants, is_offline_mode
from written_folders import saved

from dschat.data.hub import reach_hub
from dschat.data.sources import open_source
from dschat.errors import UserError


def test_a_hub_without_a_connection_is_said_at_once_and_not_asked_again(monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    reach_hub.cache_clear()
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("huggingface_hub waits to try again"))
    with pytest.raises(UserError, match="some/set: there is no such file or folder here"):
        open_source("some/set")
    assert is_offline_mode()
    assert capsys.readouterr().out.count("WARNING: http://127.0.0.1:9 cannot be reached (") == 1
    reach_hub.cache_clear()


def test_the_hub_is_asked_for_configuration_and_revision(monkeypatch, tmp_path):
    loaded = datasets.load_from_disk(saved(tmp_path / "saved", ["train.jsonl", "test.jsonl"]))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda **options: asked.append(options) or loaded)
    for entry in (
        "some/set:config=main,revision=refs/pr/1:0.3",
        "openai/gsm8k:config=socratic",
        "openai/gsm8k",
    ):
        open_source(entry)
    assert asked == [
        {"path": "some/set", "name": "main", "revision": "refs/pr/1"},
        {"path": "openai/gsm8k", "name": "socratic"},
        {"path": "openai/gsm8k", "name": "main"},
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            "some/set",
            "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']",
        ),
        ("some/set:config=x", "BuilderConfig 'x' not found. Available: ['main', 'socratic']"),
        ("some/set", "Couldn't find cache\nAvailable configs in the cache: ['main', 'socratic']"),
    ],
)
def test_configurations_of_the_hub_are_listed_with_what_to_write(monkeypatch, entry, message):
    def load(**options):
        raise ValueError(message)

    monkeypatch.setattr(datasets, "load_dataset", load)
    told = (
        r"\(found: main, socratic\)\. Write --data_path some/set:config=main or --data_path some/set:config=s"
    )
    with pytest.raises(UserError, match=told):
        open_source(entry)


def test_a_hub_that_cannot_be_reached_names_the_flag_and_a_way_out(monkeypatch):
    def unreachable(path):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"--data_path some/set: .*ConnectionError: no route.* go online"):
        open_source("some/set")
