"""A headless Chromium that tests steer over a pipe (the DevTools protocol), without a driver of its own.

def test_a_page(browser, tmp_path):  # the fixture of conftest.py: one browser for all tests of a process
    browser.window(390)
    browser.open(path.as_uri())
    assert browser.problems() == [] and browser.overflow() == 0
    browser.screenshot("page")
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

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LAPTOP, PHONE = 1280, 390
"""Widths in pixels."""
PALE = """
(() => {
  const light = (colour) => {
    const [r, g, b] = colour.map((part) => part / 255).map(
      (part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const over = (below, colour) => {
    canvas.fillStyle = `rgb(${below.join(" ")})`;
    canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const behind = (element) => element === null ? [255, 255, 255]
    : over(behind(element.parentElement), getComputedStyle(element).backgroundColor);
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
    if (!text || !element.checkVisibility() || element.closest("style, script, :disabled, title")) continue;
    const style = getComputedStyle(element), paper = behind(element);
    const colours = [paper, over(paper, element.closest("svg") ? style.fill : style.color)];
    const [dark, bright] = colours.map(light).sort((a, b) => a - b);
    const contrast = (bright + 0.05) / (dark + 0.05);
    if (contrast < 4.5) found.push([text.slice(0, 40), contrast]);
  }
  return found;
})()
"""
"""Visible texts whose contrast is below 4.5 (WCAG 2.2, level AA)."""


class Browser:
    """One page of a browser that lives as long as the block."""

    def __init__(self) -> None:
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
        self.window()
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

    def window(self, width: int = LAPTOP, scheme: str = "light") -> None:
        """Be so wide, of a height that goes with it, for a reader who prefers "light" or "dark"."""
        self._width = width
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.emulate(scheme)

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
        return self.evaluate("document.documentElement.scrollWidth") - self._width

    def screenshot(self, name: str) -> None:
        """The whole page as NAME.png in the folder of the variable DSCHAT_SCREENSHOTS, if there is one."""
        if folder := os.environ.get("DSCHAT_SCREENSHOTS"):
            found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
            Path(folder, f"{name}.png").write_bytes(base64.b64decode(found["data"]))

    def check(self, path: Path, name: str) -> None:
        """That a report asks for nothing, and is right in every variant."""
        self.open(path.as_uri())
        self.check_variants(name)
        assert self.requests() == [path.as_uri()]
        assert self.problems() == []

    def check_variants(self, name: str) -> None:
        """That it fits a laptop and a phone and is readable light and dark; `name` is of screenshots.

        Its parts are unfolded for that, and as they were in screenshots.
        """
        self.evaluate("window.folded = [...document.querySelectorAll('details:not([open])')]; 0")
        for width, of_width in ((LAPTOP, "laptop"), (PHONE, "phone")):
            for scheme in ("light", "dark"):
                self.window(width, scheme)
                self.screenshot(f"{name}_{of_width}_{scheme}")
                self.evaluate("folded.forEach((one) => { one.open = true; })")
                assert (self.overflow(), self.evaluate(PALE)) == (0, []), (of_width, scheme)
                self.evaluate("folded.forEach((one) => { one.open = false; })")

    def _of(self, method: str, value: Callable[[dict[str, Any]], str]) -> list[str]:
        return [value(event["params"]) for event in self._events if event["method"] == method]
