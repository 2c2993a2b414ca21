"""What the app answers to a client, apart from HTTP. Over sockets it is in test_server.py."""

import pytest
from servers import Scripted

from dschat.errors import UserError
from dschat.serving.app import App
from dschat.serving.duels import Duels
from dschat.serving.protocol import ApiError
from dschat.serving.worker import Limits, Worker

BODY = {"messages": [{"role": "user", "content": "Hi"}]}


class Client:
    def __init__(self):
        self.events, self.gone = [], False

    def has_gone(self):
        return self.gone

    def start_stream(self):
        assert not self.events

    def send_event(self, event):
        self.events.append(event)


def app_of(*speakers, duels=None, settings=None, **limits):
    bounds = Limits(**limits)
    workers = [Worker(*pair, most_waiting=9) for pair in zip("ab", speakers, strict=False)]
    return App(workers, limits=bounds, settings=settings or {}, duels=duels)


def test_settings_that_leave_a_model_no_room_are_refused_at_the_start():
    with pytest.raises(UserError, match="max_tokens 4096 leaves no room for a question in the model's 4096"):
        app_of(Scripted("tea"), settings={"max_tokens": 4096})


def test_without_a_length_an_answer_gets_the_room_there_is():
    app = app_of(Scripted("tea"), length=100, settings={"max_tokens": 99})
    asked = app.post("/v1/chat/completions", BODY, Client())
    assert asked["choices"][0]["message"]["content"] == "tea"
    messages = [{"role": "system", "content": "Be brief."}, *BODY["messages"]]
    with pytest.raises(
        ApiError, match="the prompt has 2 tokens and 99 for the answer; there is room for 100"
    ):
        app.post("/v1/chat/completions", {"messages": messages, "max_tokens": 99}, Client())


def test_a_duel_streams_both_sides_and_then_its_name(tmp_path):
    duels = Duels(tmp_path / "votes.jsonl", seed=0)
    app, client = app_of(Scripted("one"), Scripted("two"), duels=duels), Client()
    app.post("/duels", BODY, client)
    *events, last, done = client.events
    texts = {side: "".join(e["text"] for e in events if e.get("side") == side) for side in ("left", "right")}
    assert sorted(texts.values()) == ["one", "two"]
    assert sorted(e["end"] for e in events if "end" in e) == ["left", "right"]
    assert done == "[DONE]"
    models = app.post("/votes", {"duel": last["duel"], "vote": "tie"}, client)
    assert texts == {side: {"a": "one", "b": "two"}[models[side]] for side in ("left", "right")}


def test_one_model_has_no_duels():
    for path in ("/duels", "/votes"):
        with pytest.raises(ApiError, match="nothing at this path"):
            app_of(Scripted("tea")).post(path, BODY, Client())


def test_a_client_that_is_gone_ends_its_job():
    client = Client()
    client.gone = True
    with pytest.raises(ConnectionError):
        app_of(Scripted("tea")).post("/v1/chat/completions", BODY, client)


def test_a_closed_app_ends_what_waits():
    app = app_of(Scripted("tea"))
    app.close()
    with pytest.raises(ApiError, match="the server ends") as error:
        app.post("/v1/chat/completions", BODY, Client())
    assert error.value.status == 503
