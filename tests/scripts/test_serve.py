"""The flags of scripts/serve.py. What it serves is in tests/serving."""

import json
import threading
import urllib.request

import pytest
from tiny import save_tiny_model

from dschat.errors import UserError
from scripts import serve


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--votes", "v.jsonl"], "--votes needs a second model to vote against"),
        (["--max_waiting", "0"], "--max_waiting must be at least 1, got 0"),
        (["--request_timeout", "0"], r"--request_timeout must lie in \(0, 86400\) seconds"),
        (["--request_timeout", "nan"], "--request_timeout must lie in"),
        (["--temperature", "-1"], "temperature must be a number"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached from elsewhere; add --allow_remote"),
        (["--host", "0.0.0.0", "--allow_remote"], "--allow_remote needs a key: export DSCHAT_API_KEY"),
        (["--port", "99999"], "--port 99999 cannot be listened on"),
        (["--versus", "gone"], "--versus gone is the model itself"),
        (["--port", "0"], "MODEL .*there is no such folder"),
    ],
)
def test_flags_that_cannot_work_are_refused_before_a_model_is_loaded(flags, message, monkeypatch):
    monkeypatch.delenv(serve.KEY, raising=False)
    with pytest.raises(UserError, match=message):
        serve.build(serve.parse(["./gone", *flags]))


def test_models_are_called_by_the_ends_of_their_paths():
    assert serve.names_of(["out/actor"]) == ["actor"]
    assert serve.names_of(["out/ppo/actor", "out/dpo/actor/"]) == ["ppo/actor", "dpo/actor"]


def test_two_models_are_served_with_the_settings_of_the_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [save_tiny_model(tmp_path / name, seed=seed) for seed, name in enumerate(("sft", "ppo"))]
    flags = ["--versus", folders[1], "--port", 0, "--temperature", 0.5, "--max_tokens", 9]
    with serve.build(serve.parse(list(map(str, [folders[0], *flags])))) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_address[1]}/about.json") as reply:
            about = json.load(reply)
        server.shutdown()
    assert about == {
        "models": ["sft", "ppo"],
        "duels": True,
        "settings": {"temperature": 0.5, "top_p": 1.0, "max_tokens": 9},
    }
    assert (tmp_path / "votes.jsonl").read_text() == ""
