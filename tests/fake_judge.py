"""A judge behind an OpenAI-compatible API, in the process of a test."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar


class FakeJudge(BaseHTTPRequestHandler):
    """Prefers the longer answer; among answers that hold an x it prefers the first place, and of `?` it does
    not speak as asked."""

    requests: ClassVar[list[dict]] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).requests.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
        text = body["messages"][0]["content"]
        first, second = re.search(
            r"\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)\n\nEnd with", text, re.DOTALL
        ).groups()
        better = "A" if "x" in first + second or len(first) > len(second) else "B"
        content = "I like both." if "?" in first + second else f"So [[C]]? No: [[{better}]]"
        reply = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


@contextmanager
def judging() -> Iterator[str]:
    """The URL of its API."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeJudge)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
