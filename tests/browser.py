"""A headless Chromium, driven over a pipe by its DevTools protocol: nothing but the browser has to be installed."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--remote-debugging-pipe", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--mute-audio",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions",
    "--disable-dev-shm-usage", "--renderer-process-limit=1",
)  # fmt: skip
# It reads from 3 and writes to 4.
START = "import os, sys; r, w, *new = sys.argv[1:]; os.dup2(int(r), 3); os.dup2(int(w), 4); os.execv(new[0], new)"


def find_browser():
    """Returns the path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def browser(directory):
    """Yields a function that opens a page; `directory` is for the browser's profile."""
    import fcntl

    ends = [*os.pipe(), *os.pipe()]
    reads, ours, mine, writes = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    flags = [*FLAGS, f"--user-data-dir={directory}", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    command = [sys.executable, "-S", "-c", START, str(reads), str(writes), find_browser(), *flags]
    with subprocess.Popen(
        command, pass_fds=(reads, writes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        os.close(reads)
        os.close(writes)
        with open(ours, "wb", buffering=0) as to, open(mine, "rb", buffering=0) as of:
            link = Link(to, of)
            yield lambda url, **options: Page(link, url, **options)
            with contextlib.suppress(OSError):
                link.call("Browser.close")
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


class Link:
    """The pipe: commands, their results, and the events between them."""

    def __init__(self, to, of):
        self.to, self.of, self.number, self.rest, self.events = to, of, 0, b"", []

    def call(self, method, session=None, **params):
        """Returns the result of a command."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        self.to.write(json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                read = self.of.read(2**16)
                assert read, "the browser has ended"
                self.rest += read
            found, _, self.rest = self.rest.partition(b"\0")
            message = json.loads(found)
            if message.get("id") == self.number:
                assert "error" not in message, (method, message)
                return message["result"]
            if "method" in message:
                self.events.append(message)


KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, ""), " ": (32, " "), "ArrowRight": (39, "")}


class Page:
    """One page in a profile of its own."""

    def __init__(self, link, url, *, width=1200, height=800, dark=False, mobile=False):
        self.link = link
        self.context = link.call("Target.createBrowserContext")["browserContextId"]
        target = link.call("Target.createTarget", url="about:blank", browserContextId=self.context)["targetId"]
        self.session = link.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.size(width, height, mobile)
        self.prefer(dark)
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def call(self, method, **params):
        return self.link.call(method, self.session, **params)

    def close(self):
        self.link.call("Target.disposeBrowserContext", browserContextId=self.context)

    def size(self, width, height, mobile=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def prefer(self, dark):
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        motion = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.call("Emulation.setEmulatedMedia", features=[scheme, motion])

    def eval(self, script):
        """Returns the value of an expression."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, (script, result["exceptionDetails"])
        return result["result"].get("value")

    def wait(self, script, seconds=8):
        """Waits until an expression is true, and returns its value."""
        until = time.monotonic() + seconds
        while not (value := self.eval(script)):
            assert time.monotonic() < until, (script, self.eval("document.body.innerText"))
            time.sleep(0.02)
        return value

    def text(self, selector):
        return self.eval(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)")

    def click(self, selector):
        """Clicks where it is, as a mouse would: what covers it is hit instead."""
        x, y = self.eval(
            f"(r => [r.x + r.width / 2, r.y + r.height / 2])"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def press(self, key, shift=False):
        code, text = KEYS[key]
        options = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **options)
        self.call("Input.dispatchKeyEvent", type="keyUp", **options)

    def picture(self, path):
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def events(self, method):
        """Returns the parameters of all events of a kind so far."""
        self.eval("0")
        return [e["params"] for e in self.link.events if e["method"] == method and e.get("sessionId") == self.session]
