"""Scores over HTTP: what may pass is tried again, what does not ends the run with URL and cause."""

import base64
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from dschat.errors import UserError
from dschat.rlhf.rewards import endpoint as endpoint_module
from dschat.rlhf.rewards import http_posts
from dschat.rlhf.rewards.endpoint import RewardEndpoint
from dschat.rlhf.rewards.text_answers import Problem, TextAnswers


class Server:
    """Answers each request with the next of `replies`, the last for ever: a status, a body, or seconds."""

    def __init__(self, *replies):
        self.requests, self.replies = [], list(replies)
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.requests.append(body)
                reply = owner.replies.pop(0) if len(owner.replies) > 1 else owner.replies[0]
                if isinstance(reply, float):
                    time.sleep(reply)
                if isinstance(reply, int):
                    self.send_error(reply)
                    return
                owner.headers = self.headers
                if isinstance(reply, tuple):  # what trickles in
                    status, headers, pieces = reply
                    self.send_response(status)
                    for header in headers:
                        self.send_header(*header)
                    self.end_headers()
                    for piece in pieces:
                        self.wfile.write(piece)
                        time.sleep(0.05)
                    return
                if callable(reply):
                    reply = json.dumps({"scores": reply(body)})
                self.send_response(200)
                self.end_headers()
                self.wfile.write(str(reply).encode())

            def log_message(self, *_):
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/score"
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(endpoint_module, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def lengths(body):
    return [len(answer) for answer in body["answers"]]


def endpoint(url, *, batch_size=8, seconds=5.0, retries=2):
    return RewardEndpoint("endpoint", url, batch_size=batch_size, seconds=seconds, retries=retries)


ANSWERED = TextAnswers(["p", "q", "r"], ["a", "bb", "ccc"], {"solution": [1, None, "é"]})


def test_prompts_answers_and_columns_are_posted_in_batches():
    with Server(lengths) as server:
        assert endpoint(server.url, batch_size=2).score(ANSWERED) == [1.0, 2.0, 3.0]
    first, second = server.requests
    assert first == {"prompts": ["p", "q"], "answers": ["a", "bb"], "columns": {"solution": [1, None]}}
    assert second == {"prompts": ["r"], "answers": ["ccc"], "columns": {"solution": ["é"]}}


@pytest.mark.parametrize("failure", [500, 503, 429])
def test_what_may_pass_is_tried_again_and_said(failure, capsys):
    with Server(failure, failure, lengths) as server:
        assert endpoint(server.url).score(ANSWERED) == [1.0, 2.0, 3.0]
    assert len(server.requests) == 3
    assert f"HTTP {failure}" in capsys.readouterr().out


def test_a_slow_answer_is_asked_for_again():
    with Server(0.5, lengths) as server:
        assert endpoint(server.url, seconds=0.2).score(ANSWERED) == [1.0, 2.0, 3.0]


def test_an_endpoint_that_is_gone_ends_the_run_with_url_and_cause():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/score"
    with pytest.raises(UserError, match=rf"--reward_endpoint {url}: .*refused.*3 times in a row"):
        endpoint(url).score(ANSWERED)


def test_retries_double_their_pause(monkeypatch):
    pauses = []
    monkeypatch.setattr(endpoint_module.time, "sleep", pauses.append)
    with Server(503) as server, pytest.raises(UserError, match=r"HTTP 503.*4 times in a row"):
        endpoint(server.url, retries=3).score(ANSWERED)
    assert pauses == [0.01, 0.02, 0.04]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (404, "HTTP 404"),
        ("no JSON", "a reply without .*no JSON"),
        ('{"score": [1]}', "a reply without"),
        ("[1, 2, 3]", "a reply without"),
        ('{"scores": [1, 2]}', "no list of 3 numbers"),
        ('{"scores": 1}', "no list of 3 numbers"),
    ],
)
def test_a_reply_that_is_none_ends_the_run_at_once(reply, message):
    with Server(reply) as server, pytest.raises(UserError, match=message):
        endpoint(server.url).score(ANSWERED)
    assert len(server.requests) == 1


def test_a_score_that_is_no_number_is_one_answers_problem():
    with Server('{"scores": [1, null, NaN]}') as server:
        first, *others = endpoint(server.url).score(ANSWERED)
    assert first == 1.0
    assert [type(other) for other in others] == [Problem, Problem]
    assert [other.kind for other in others] == ["no finite number"] * 2


def test_a_reply_that_trickles_in_is_bounded_in_time():
    """Each byte comes well within the time, the whole does not."""
    late = r"no whole reply within 0\.3 s, 2 times in a row"
    with Server((200, [], [b" "] * 100)) as server, pytest.raises(UserError, match=late):
        endpoint(server.url, seconds=0.3, retries=1).score(ANSWERED)


def test_a_reply_is_bounded_in_size(monkeypatch):
    monkeypatch.setattr(endpoint_module, "LONGEST_REPLY", 1 << 20)
    with Server((200, [], [b"[" * (1 << 21)])) as server, pytest.raises(UserError, match="more than 1 MiB"):
        endpoint(server.url).score(ANSWERED)
    assert len(server.requests) == 1


def test_a_reply_that_breaks_off_is_asked_for_again():
    broken = (200, [("Content-Length", "1000")], [b'{"scores": [1, 2, 3]}'])
    with Server(broken, lengths) as server:
        assert endpoint(server.url).score(ANSWERED) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirection_is_named_and_not_followed(status):
    reply = (status, [("Location", "http://user:word@else.where/score?key=word")], [])
    where = f"HTTP {status} .*to http://\\*\\*\\*@else.where/score"
    with Server(reply) as server, pytest.raises(UserError, match=where) as caught:
        endpoint(server.url).score(ANSWERED)
    assert "word" not in str(caught.value)
    assert len(server.requests) == 1


def test_a_server_on_this_machine_is_asked_without_the_proxy(monkeypatch):
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with Server(lengths) as server:
        for host in ("127.0.0.1", "localhost", "127.1.2.3"):
            url = server.url.replace("127.0.0.1", host)
            if host != "127.1.2.3":  # where nothing listens, but not through the proxy either
                assert endpoint(url).score(ANSWERED) == [1.0, 2.0, 3.0]
            assert http_posts.proxy_of(url) is None
    assert http_posts.proxy_of("http://[::1]:80/") is None
    assert http_posts.proxy_of("http://somewhere.else/") is not None


def test_a_proxy_is_named_with_its_variable_and_without_its_password(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://me:word@127.0.0.1:9")
    with pytest.raises(UserError) as caught:
        endpoint("http://somewhere.else/score", retries=0).score(ANSWERED)
    assert "through the proxy http://***@127.0.0.1:9 of http_proxy" in str(caught.value)
    assert "no_proxy" in str(caught.value)
    assert "word" not in str(caught.value)


def test_a_proxy_serves_where_it_stands(monkeypatch):
    """It gets the whole URL, as a proxy does."""
    with Server(lengths) as server:
        monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/score"))
        assert endpoint("http://somewhere.else/score").score(ANSWERED) == [1.0, 2.0, 3.0]


def test_a_password_is_sent_and_named_nowhere(capsys):
    with Server(503, lengths) as server:
        url = server.url.replace("http://", "http://us%40er:p%2Fw:word@") + "?key=secret&token"
        assert endpoint(url).score(ANSWERED) == [1.0, 2.0, 3.0]
    name, password = (
        base64.b64decode(server.headers["Authorization"].removeprefix("Basic ")).decode().split(":", 1)
    )
    assert (name, password) == ("us@er", "p/w:word")
    said = capsys.readouterr().out
    assert f"{server.url.replace('http://', 'http://***@')}?key=***&***: HTTP 503" in said
    assert not [secret for secret in ("word", "secret", "token") if secret in said]


@pytest.mark.parametrize("number", ["1e400", "1e300", "9" * 400])
def test_a_number_that_fp32_does_not_hold_is_one_answers_problem(number):
    with Server(f'{{"scores": [{number}, 1, 2]}}') as server:
        first, *others = endpoint(server.url).score(ANSWERED)
    assert first.kind == "no finite number"
    assert others == [1.0, 2.0]


def test_brackets_without_an_end_are_a_bad_reply():
    with Server("[" * 200_000) as server, pytest.raises(UserError, match="a reply without"):
        endpoint(server.url).score(ANSWERED)
