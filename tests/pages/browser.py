"""A headless browser, spoken to through its debugging pipe: what a page looks like, how wide it is, and what it complains about."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find():
    """The browser's path; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser to look at pages with: none of {', '.join(NAMES)} is installed")
    return found


class Browser:
    """One page in one browser; use it as a context."""

    def __enter__(self):
        program = find()  # before anything is held that a skip would leave behind
        down, up = os.pipe(), os.pipe()
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--hide-scrollbars",
        ]
        options += ["--remote-debugging-pipe", f"--user-data-dir={self._profile.name}", "about:blank"]

        read, write = (fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (down[0], up[1]))
        wired = (
            f'exec "$@" 3<&{read} 4>&{write}'  # the browser reads what is 3 and writes to what is 4; Python's own way would fork
        )
        self._process = subprocess.Popen(
            ["bash", "-c", wired, "browser", program, *options],
            pass_fds=(read, write), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read)
        os.close(write)
        os.close(down[0])
        os.close(up[1])
        self._write, self._read = down[1], up[0]
        self._left, self._number, self.events, self._session = b"", 0, [], None
        targets = self.ask("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        return self

    def __exit__(self, *error):
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()

    def ask(self, method, **params):
        """What the browser answers; what it tells meanwhile is in `events`."""
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps({"id": self._number, "method": method, "params": params} | session).encode() + b"\0")
        while True:
            message = self._next()
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def _next(self):
        while b"\0" not in self._left:
            more = os.read(self._read, 1 << 16)
            assert more, "the browser ended"
            self._left += more
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)

    def show(self, path, width, dark=False, scale=1):
        """Opens a page, a file or an address, at a width in CSS pixels, and waits until it is drawn."""
        served = str(path).startswith("http://127.0.0.1:")
        self._own = (str(path), "data:") if served else ("file:", "data:")
        self.events.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=scale, mobile=False)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.ask("Page.navigate", url=str(path) if served else Path(path).absolute().as_uri())
        deadline = time.monotonic() + 60
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < deadline, "the page does not load"
            self.value("1")
        self.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def value(self, script):
        """The value of a script, of a promise what it becomes."""
        found = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def screenshot(self, path, clip=None):
        """Writes the whole page, or a rectangle of it, as a PNG."""
        part = {} if clip is None else {"clip": clip}
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True, format="png", **part)
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def point(self, x, y):
        """Moves the mouse."""
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def complaints(self):
        """Errors, warnings, and requests for anything but the page itself and what is served beside it."""
        found = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown" or (
                method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning")
            ):
                found.append(params)
            if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"])
            if method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(self._own):
                found.append(params["request"]["url"])
        return found
