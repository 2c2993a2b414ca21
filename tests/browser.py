"""A headless Chromium that tests steer over a pipe (the DevTools protocol), without a driver of its own.

with Browser(width=390) as browser:
    browser.open(path.as_uri())
    assert browser.problems() == [] and browser.overflow() == 0
    browser.screenshot(Path("page.png"))
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (apt-get install chromium)")


class Browser:
    """One page of a browser that lives as long as the block."""

    def __init__(self, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self._size, self._dark = (width, height), dark
        self._number = 0
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        from_us, self._to_browser = os.pipe()
        self._from_browser, to_us = os.pipe()
        assert CHROMIUM is not None

        def hand_over() -> None:  # the browser reads its descriptor 3 and writes 4
            for pipe, number in [
                (fcntl.fcntl(end, fcntl.F_DUPFD, 10), n) for end, n in ((from_us, 3), (to_us, 4))
            ]:
                os.dup2(pipe, number)

        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            "--no-first-run",
        ]
        flags += ["--disable-background-networking", "--disable-dev-shm-usage", "--hide-scrollbars"]
        self._process = subprocess.Popen(
            [CHROMIUM, *flags, f"--user-data-dir={self._profile.name}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=hand_over,
        )
        os.close(from_us)
        os.close(to_us)
        self._buffer = b""
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        width, height = self._size
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )
        self.emulate("dark" if self._dark else "light")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to_browser)
        os.close(self._from_browser)
        self._profile.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to_browser, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._number:
                assert "error" not in found, f"{method}: {found['error']}"
                return found["result"]
            self._events.append(found)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = os.read(self._from_browser, 2**16)
            assert chunk, "the browser has ended"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def emulate(self, scheme: str) -> None:
        """Tell the page that its reader prefers "light" or "dark"."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, url: str) -> None:
        """Open a page and wait until it is loaded."""
        self._events.clear()
        self.call("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._next())

    def evaluate(self, script: str) -> Any:
        """The value of an expression of JavaScript in the page; promises are awaited."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, script: str, seconds: float = 20) -> Any:
        """The first value of the expression that is true."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(script)):
            assert time.monotonic() < end, f"{script} did not come true"
            time.sleep(0.05)
        return value

    def requests(self) -> list[str]:
        """The addresses that the page asked for, its own first."""
        return self._of("Network.requestWillBeSent", lambda found: found["request"]["url"])

    def problems(self) -> list[str]:
        """Errors and warnings of the console, and exceptions of scripts."""
        self.evaluate("1")  # events before it have arrived then
        logged = self._of(
            "Log.entryAdded", lambda found: f"{found['entry']['level']}: {found['entry']['text']}"
        )
        said = self._of("Runtime.consoleAPICalled", lambda found: f"{found['type']}: {found['args']}")
        raised = self._of("Runtime.exceptionThrown", lambda found: str(found["exceptionDetails"]))
        return [line for line in logged + said if line.startswith(("error", "warning"))] + raised

    def overflow(self) -> int:
        """By how many pixels the page is wider than the window."""
        return self.evaluate("document.documentElement.scrollWidth") - self._size[0]

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def _of(self, method: str, value: Callable[[dict[str, Any]], str]) -> list[str]:
        return [value(event["params"]) for event in self._events if event["method"] == method]
