"""What bounds a POST whatever the server does, and which proxy stands before it."""

import contextlib
import gzip
import socket
import threading
import time

import httpx2
import pytest

from dschat.rlhf.rewards.http_posts import Proxy, TooLong, cause_of, post, proxy_of


@contextlib.contextmanager
def server(pieces, pause=0.0):
    """A server of one request, which writes the pieces with a pause after each: its URL, what it got."""
    listener, received = socket.create_server(("127.0.0.1", 0)), []

    def serve():
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                received.append(b"")
                while not received[0].endswith(b"{}") and (more := connection.recv(1 << 16)):
                    received[0] += more
                for piece in pieces:
                    connection.sendall(piece)
                    time.sleep(pause)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/score", received
    listener.close()
    thread.join()


def send(url, proxy=None, seconds=5.0, longest=100):
    return post(url, b"{}", proxy, seconds=seconds, longest=longest)


OK = b"HTTP/1.1 200 OK\r\n\r\n"


@pytest.mark.parametrize("head", [OK[:9], OK], ids=["headers", "body"])
def test_whatever_trickles_in_ends_when_the_time_is_over(head):
    """Each byte comes well within the time, the whole does not."""
    with server([head, *[b"x"] * 30], pause=0.05) as (url, _), pytest.raises(TimeoutError) as error:
        send(url, seconds=0.3)
    assert str(error.value) == cause_of(error.value) == "no whole reply within 0.3 s"


def test_a_reply_of_the_longest_size_is_taken_and_one_of_a_byte_more_is_not():
    with server([OK, b"x" * 100]) as (url, _):
        assert send(url) == b"x" * 100
    with server([OK, b"x" * 101]) as (url, _), pytest.raises(TooLong):
        send(url)


def test_no_packing_is_asked_for_and_none_undone_which_would_take_any_memory():
    packed = gzip.compress(b"x" * 1000)
    with server([b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n", packed]) as (url, received):
        assert send(url) == packed
    assert b"Accept-Encoding: identity\r\n" in received[0]
    assert b"Content-Type: application/json\r\n" in received[0]


@pytest.mark.parametrize("status", [b"302 Found", b"404 Not Found", b"503 Busy"])
def test_what_is_no_success_is_raised_with_its_status(status):
    head = b"HTTP/1.1 " + status + b"\r\nLocation: http://127.0.0.1:9/\r\n\r\n"
    with server([head]) as (url, _), pytest.raises(httpx2.HTTPStatusError) as error:
        send(url)
    assert f"{error.value.response.status_code} {error.value.response.reason_phrase}" == status.decode()


@pytest.mark.parametrize(
    ("url", "cause"),
    [
        ("http://127.0.0.1:9/", "[Errno 111] Connection refused"),
        ("http://no.such.host.invalid/", "[Errno -"),
    ],
)
def test_the_cause_is_in_the_systems_words(url, cause):
    with pytest.raises(httpx2.ConnectError) as error:
        send(url)
    assert cause_of(error.value).startswith(cause)


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_a_proxy_may_be_a_host_and_a_port_alone(scheme):
    with server([OK, b"{}"]) as (url, received):
        host = url.removeprefix("http://").removesuffix("/score")
        assert send("http://somewhere.else/score", Proxy(scheme + host, "http_proxy")) == b"{}"
    assert received[0].startswith(b"POST http://somewhere.else/score HTTP/1.1\r\n")


def test_a_proxy_of_another_kind_is_an_error_and_not_passed_over():
    with pytest.raises(OSError, match="unknown url type: socks5"):
        send("http://127.0.0.1:9/", Proxy("socks5://127.0.0.1:9", "http_proxy"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "a.localhost", "[::1]", "0.0.0.0"])
def test_a_server_on_this_machine_has_no_proxy(monkeypatch, host):
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert proxy_of(f"http://{host}:80/") is None


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY"])
def test_a_server_elsewhere_has_the_proxy_of_the_environment_unless_it_is_excepted(monkeypatch, variable):
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    assert proxy_of("http://somewhere.else/") == Proxy("http://127.0.0.1:9", variable)
    assert proxy_of("https://somewhere.else/") is None
    monkeypatch.setenv("no_proxy", "somewhere.else")
    assert proxy_of("http://somewhere.else/") is None


def test_a_user_and_password_go_into_a_header_and_not_into_the_request_to_a_proxy():
    with server([OK, b"{}"]) as (url, received):
        send("http://us%40er:p%3Aw@somewhere.else/score#top", Proxy(url.removesuffix("/score"), "http_proxy"))
    assert received[0].startswith(b"POST http://somewhere.else/score HTTP/1.1\r\n")
    assert b"Authorization: Basic dXNAZXI6cDp3\r\n" in received[0]  # base64 of us@er:p:w
    assert b"us%40er" not in received[0]
