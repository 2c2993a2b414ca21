"""The server over sockets: who is let in, what is refused, and clients that misbehave."""

import http.client
import json
import socket
import threading
import time

import pytest
from servers import serving

from dschat.errors import UserError
from dschat.rlhf.rollout.backend import Sampling
from dschat.serving.server import Server, is_loopback
from dschat.serving.speaker import Interrupted, SpokenAnswer
from dschat.serving.worker import Limits

QUESTION = {"messages": [{"role": "user", "content": "Name a tea."}], "max_tokens": 8, "seed": 1}
JSON = {"Content-Type": "application/json"}


def request(server, method, path, body=None, headers=JSON):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    text = body if isinstance(body, str | bytes | None) else json.dumps(body)
    connection.request(method, path, text, dict(headers))
    response = connection.getresponse()
    return response, response.read().decode()


def post(server, path, body, **headers):
    response, text = request(server, "POST", path, body, {**JSON, **headers})
    return response.status, json.loads(text)


class Slow:
    """A speaker that gives a token every so often until nobody listens, and counts them."""

    positions = 4096

    def __init__(self, seconds=0.02):
        self.seconds, self.given, self.over = seconds, 0, threading.Event()

    def read(self, prompt, *, max_tokens=None):
        return [1, 2], False

    def answer(self, ids, sampling: Sampling, on_text, *, sample=0, stops=(), as_written=False):
        try:
            for _ in range(sampling.max_answer_length):
                time.sleep(self.seconds)
                self.given += 1
                on_text("tea ")
        except Interrupted:
            self.over.set()
            return SpokenAnswer("tea", [1], "interrupted")
        return SpokenAnswer("tea", [1], "length")


def raw(server, text):
    client = socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=20)
    client.sendall(text)
    return client


def asking(body):
    text = json.dumps(body).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(text) + text


def test_whole_answers_streams_and_counts_agree(server, speaker):
    status, whole = post(server, "/v1/chat/completions", QUESTION)
    assert status == 200
    choice, usage = whole["choices"][0], whole["usage"]
    ids, _ = speaker.read("Name a tea.")
    expected = speaker.answer(ids, Sampling(max_answer_length=8, seed=1))
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == expected.end
    assert usage["prompt_tokens"] == len(ids)
    assert usage["completion_tokens"] == len(expected.ids) == usage["total_tokens"] - len(ids)
    streamed = {**QUESTION, "stream": True, "stream_options": {"include_usage": True}}
    response, text = request(server, "POST", "/v1/chat/completions", streamed)
    assert response.getheader("Content-Type") == "text/event-stream"
    *events, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"]]
    assert "".join(pieces) == expected.text
    assert chunks[-2]["choices"][0]["finish_reason"] == expected.end
    assert chunks[-1]["usage"] == usage
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_text_is_completed_as_it_stands(server, speaker):
    body = {"prompt": "Count to", "max_tokens": 8, "seed": 1, "model": "a"}
    status, found = post(server, "/v1/completions", body)
    expected = speaker.answer(
        speaker.read_text("Count to"), Sampling(max_answer_length=8, seed=1), as_written=True
    )
    assert (status, found["object"], found["choices"][0]["text"]) == (200, "text_completion", expected.text)


def test_models_are_listed(server):
    models = json.loads(request(server, "GET", "/v1/models")[1])
    assert [model["id"] for model in models["data"]] == ["a"]
    assert json.loads(request(server, "GET", "/v1/models/a")[1])["object"] == "model"


@pytest.mark.parametrize(
    ("body", "status", "code", "message"),
    [
        ("{", 400, "invalid_json", "no JSON"),
        ("[" * 100_000, 400, "invalid_json", "no JSON"),
        ("[]", 400, "invalid_value", "must be a JSON object"),
        ({}, 400, "missing_required_parameter", "messages is missing"),
        ({"messages": []}, 400, "invalid_value", "list of messages"),
        ({"messages": [{"role": "user"}]}, 400, "invalid_value", 'has no "content"'),
        ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "invalid_value", "must be the user's"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "invalid_value", "surrogate"),
        (QUESTION | {"temprature": 1}, 400, "invalid_value", "no parameter 'temprature'"),
        (QUESTION | {"n": 2}, 400, "invalid_value", "n is not supported"),
        (QUESTION | {"stream": "yes"}, 400, "invalid_value", "stream must be of type bool"),
        (QUESTION | {"temperature": "1"}, 400, "invalid_value", "temperature must be a number"),
        (QUESTION | {"temperature": 1e999}, 400, "invalid_value", "temperature must be a number"),
        (QUESTION | {"max_tokens": 301}, 400, "invalid_value", r"in [1, 300], got 301"),
        (QUESTION | {"stop": [1]}, 400, "invalid_value", "stop must be"),
        (QUESTION | {"model": "b"}, 404, "model_not_found", "no model 'b'"),
        (
            {"messages": [{"role": "user", "content": "tea " * 2000}]},
            400,
            "context_length_exceeded",
            "there is room for 512",
        ),
        (b" " * (2**20 + 1), 413, "body_too_large", "at most 1048576 bytes"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_in_the_form_of_openai(server, body, status, code, message):
    found, answer = post(server, "/v1/chat/completions", body)
    error = answer["error"]
    assert (found, error["code"], error["type"]) == (status, code, "invalid_request_error")
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_pages_of_elsewhere_and_other_names_of_this_machine_are_refused(server):
    port = server.server_address[1]
    for headers, status in (
        ({"Host": f"localhost:{port}"}, 200),
        ({"Host": f"127.0.0.1:{port}", "Origin": f"http://127.0.0.1:{port}"}, 200),
        ({"Host": f"rebound.example:{port}"}, 403),
        ({"Origin": "http://example.com"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
    ):
        assert request(server, "GET", "/v1/models", headers=headers)[0].status == status, headers
    # What a form of another page can send without asking.
    status, answer = post(server, "/v1/chat/completions", QUESTION, **{"Content-Type": "text/plain"})
    assert (status, answer["error"]["code"]) == (415, "unsupported_media_type")


def test_nothing_but_the_page_is_read_from_the_disk(server):
    page, html = request(server, "GET", "/")
    policy = page.getheader("Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert html.count("<script") == html.count('<script src="page.js">') == 1
    for path in ("/../app.py", "/page.html.jinja", "/%2e%2e/etc/passwd", "//etc/passwd", "/page.js/.."):
        response, text = request(server, "GET", path)
        assert (response.status, json.loads(text)["error"]["code"]) == (404, "not_found")


def test_a_key_is_asked_for_where_there_is_one(speaker):
    with serving(speaker, key="s3cret") as server:
        assert request(server, "GET", "/")[0].status == 200  # where it can be typed in
        assert request(server, "GET", "/v1/models")[0].status == 401
        for given, status in (("Bearer s3cret", 200), ("Bearer other", 401), ("Bearer \xe9", 401)):
            headers = {"Authorization": given, "Host": "gpu-box.example"}
            assert request(server, "GET", "/v1/models", headers=headers)[0].status == status


def test_fifty_requests_at_once_are_all_answered_beside_clients_that_misbehave(server, capsys):
    found = {}

    def ask(number):
        found[number] = post(server, "/v1/chat/completions", QUESTION | {"seed": number, "max_tokens": 4})

    def misbehave(text):
        client = raw(server, text)
        client.close()

    bad = [
        b"",
        b"GET",
        b"\x00\xff\r\n\r\n",
        b"POST / HTTP/9.9\r\n\r\n",
        asking(QUESTION)[:-5],
        asking(QUESTION),
    ]
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(50)]
    threads += [threading.Thread(target=misbehave, args=(text,)) for text in bad * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {status for status, _ in found.values()} == {200}
    texts = {number: answer["choices"][0]["message"]["content"] for number, (_, answer) in found.items()}
    assert texts[7] == post(server, "/v1/chat/completions", QUESTION | {"seed": 7, "max_tokens": 4})[1][
        "choices"][0]["message"]["content"]  # fmt: skip
    assert len(set(texts.values())) > 10  # none got another's answer, as the seeds differ
    assert "Traceback" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("streams", [False, True])
def test_an_answer_ends_when_its_client_hangs_up(streams):
    slow = Slow()
    with serving(slow, tokens=5000, length=100_000) as server:
        client = raw(server, asking(QUESTION | {"max_tokens": 4000, "stream": streams}))
        while slow.given < 3:
            time.sleep(0.01)
        client.close()
        assert slow.over.wait(5)
        assert slow.given < 200
        assert post(server, "/v1/chat/completions", QUESTION)[0] == 200  # and the next is answered


def test_what_waits_is_bounded_and_so_is_the_time():
    with serving(Slow(0.05), tokens=5000, length=100_000, waiting=1, seconds=0.6) as server:
        clients = [raw(server, asking(QUESTION | {"max_tokens": 4000})) for _ in range(1)]
        time.sleep(0.2)  # the first is being answered
        clients.append(raw(server, asking(QUESTION)))
        time.sleep(0.2)  # and the second waits
        status, answer = post(server, "/v1/chat/completions", QUESTION)
        assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
        for client in clients:
            reply = http.client.HTTPResponse(client)
            reply.begin()
            assert (reply.status, json.loads(reply.read())["error"]["type"]) == (408, "timeout")


def test_a_body_that_does_not_come_is_not_waited_for(speaker):
    with serving(speaker, reading=0.3) as server:
        client = raw(server, asking(QUESTION)[:-5])
        reply = http.client.HTTPResponse(client)
        reply.begin()
        assert (reply.status, json.loads(reply.read())["error"]["code"]) == (408, "timeout")
        assert raw(server, b"GET / HT").recv(10) == b""  # nor is a request line


def test_connections_are_bounded(speaker):
    with serving(speaker, connections=1) as server:
        first = raw(server, b"GET")
        time.sleep(0.2)
        assert raw(server, b"GET / HTTP/1.1\r\n\r\n").recv(100).startswith(b"HTTP/1.1 503")
        first.close()
        time.sleep(0.2)
        assert request(server, "GET", "/health")[0].status == 200


def test_a_model_that_fails_ends_its_request_alone(speaker, monkeypatch, capsys):
    class Failing(Slow):
        def answer(self, ids, sampling, on_text, **options):
            if sampling.seed == 13:
                raise RuntimeError("CUDA error: something")
            return super().answer(ids, sampling, on_text, **options)

    with serving(Failing(0)) as server:
        status, answer = post(server, "/v1/chat/completions", QUESTION | {"seed": 13})
        assert (status, answer["error"]["code"]) == (500, "model_failed")
        assert post(server, "/v1/chat/completions", QUESTION)[0] == 200
    assert "WARNING: a could not answer a prompt of 2 tokens: RuntimeError" in capsys.readouterr().out


def test_a_port_that_is_taken_is_named(server):
    with pytest.raises(UserError, match=r"--port \d+ cannot be listened on .*--port 0"):
        Server("127.0.0.1", server.server_address[1], limits=Limits())


def test_addresses_of_this_machine_alone():
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost", "LOCALHOST")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "localhost.example", "")))
