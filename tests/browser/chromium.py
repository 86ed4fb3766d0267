"""A real Chromium over the DevTools protocol: JSON messages with a zero byte after each, through two pipes. Nothing else needed."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Browser", "Page", "find_chromium", "required_chromium"]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Chromium reads commands from descriptor 3 and answers on 4; both are set up before it starts.
WIRE = (
    "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); os.execvp(sys.argv[3], sys.argv[3:])"
)


def find_chromium() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def required_chromium() -> str:
    """Its path. Without one the test is skipped, or fails where CI is set: nobody reads there what was skipped."""
    found = find_chromium()
    if found is not None:
        return found
    missing = f"none of {', '.join(NAMES)} is here; as root on Debian, `make chromium` installs it"
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        pytest.fail(f"CI must not skip the browser tests: {missing}")
    pytest.skip(missing)


class Browser:
    """One headless process without network: no name resolves, and it is told to be offline."""

    def __init__(self, binary: str, profile: Path) -> None:
        command_read, self._write = os.pipe()
        self._read, answer_write = os.pipe()
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (command_read, answer_write)]
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND"]
        command = [sys.executable, "-c", WIRE, *map(str, ends), binary, *flags, "about:blank"]
        self._process = subprocess.Popen(
            command, pass_fds=ends, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for fd in (command_read, answer_write, *ends):
            os.close(fd)
        self._number, self._buffer = 0, b""
        self.events: list[dict[str, Any]] = []

    def close(self) -> None:
        try:
            self.send("Browser.close")
        except (OSError, RuntimeError):
            self._process.kill()
        self._process.wait(timeout=20)
        os.close(self._read)
        os.close(self._write)

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The answer to one command; what is reported meanwhile is kept in `events`."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive(20)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return dict(answer.get("result", {}))
            self.events.append(answer)

    def receive(self, seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            chunk = os.read(self._read, 1 << 16) if ready else b""
            if not chunk:
                raise RuntimeError(f"chromium said nothing within {seconds} s")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(line))

    def open(self, path: Path, width: int = 1440, height: int = 1000, scheme: str = "light") -> Page:
        """The file in a tab of its own."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        page.send("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
        page.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        page.send("Page.navigate", url=path.resolve().as_uri())
        page.wait("document.readyState === 'complete'")
        return page


class Page:
    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.send(method, self._session, **params)

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression. Raises RuntimeError with the page's own error."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"])[:500])
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, f"not within {seconds} s: {expression}"
            time.sleep(0.02)

    def settle(self) -> None:
        """Two frames: sizes are observed in one and drawn in the next."""
        self.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def text(self, selector: str) -> str:
        return str(self.value(f"document.querySelector({json.dumps(selector)}).textContent"))

    def click(self, selector: str, index: int = 0) -> None:
        x, y, _, _ = self.box(selector, index, where="center")
        self._mouse("mousePressed", x, y)
        self._mouse("mouseReleased", x, y)
        self.settle()

    def drag(self, selector: str, start: float, end: float) -> None:
        """Across an element, from and to shares of its width."""
        x, y, w, h = self.box(selector)
        self._mouse("mouseMoved", x + w * start, y + h / 2)
        self._mouse("mousePressed", x + w * start, y + h / 2)
        for part in (0.3, 0.7, 1.0):
            self._mouse("mouseMoved", x + w * (start + (end - start) * part), y + h / 2)
        self._mouse("mouseReleased", x + w * end, y + h / 2)
        self.settle()

    def box(self, selector: str, index: int = 0, where: str = "corner") -> list[float]:
        """left, top (or the centre), width, height on the screen, after scrolling there."""
        found = f"document.querySelectorAll({json.dumps(selector)})[{index}]"
        self.value(f"{found}.scrollIntoView({{block: 'center', inline: 'center'}})")
        self.settle()
        share = 0.5 if where == "center" else 0
        shape = f"[r.left + r.width * {share}, r.top + r.height * {share}, r.width, r.height]"
        return [
            float(n) for n in self.value(f"(() => {{ const r = {found}.getBoundingClientRect(); return {shape}; }})()")
        ]

    def key(self, key: str) -> None:
        pressed = {"text": "\r", "windowsVirtualKeyCode": 13} if key == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **pressed)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)
        self.settle()

    def _mouse(self, kind: str, x: float, y: float) -> None:
        held = 0 if kind == "mouseReleased" else 1
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=held, clickCount=1)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        self.settle()
        data = self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def troubles(self) -> list[str]:
        """Errors and warnings of the console, exceptions, and requests for anything but the file itself and its CSVs."""
        self.settle()
        found = []
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                continue
            method, params = event["method"], event["params"]
            if method == "Runtime.exceptionThrown":
                found.append(f"exception: {params['exceptionDetails']}")
            elif method == "Runtime.consoleAPICalled":
                found.append(f"console: {params['args']}")
            elif method == "Log.entryAdded":
                found.append(f"log: {params['entry']['text']}")
            elif method == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not url.startswith(("file:///", "blob:")):
                    found.append(f"request: {url}")
        return found
