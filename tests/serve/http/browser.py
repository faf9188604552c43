"""Chromium without a screen, driven through a pipe by its own protocol: no driver and no further
package.

with browser() as chromium:
    tab = chromium.open("http://127.0.0.1:8000/")
    tab.type("#question", "hello\\n")
    tab.until("document.title")
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
)
SECONDS = 60.0


class Tab:
    """session: of the protocol. said: what the page logged and what was refused to it. asked: every
    address."""

    def __init__(self, chromium: Chromium, session: str) -> None:
        self._chromium, self._session = chromium, session
        self.said: list[str] = []
        self.asked: list[str] = []

    def call(self, method: str, **parameters: Any) -> Any:
        return self._chromium.call(method, self._session, **parameters)

    def run(self, code: str) -> Any:
        """What an expression is; a promise is waited for. AssertionError: it throws."""
        found = self.call(
            "Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, (code, found["exceptionDetails"])
        return found["result"].get("value")

    def until(self, code: str, seconds: float = SECONDS) -> Any:
        """What an expression is, once that is something."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := self.run(code):
                return found
            time.sleep(0.03)
        raise AssertionError(
            f"not within {seconds:g} s: {code}\n{self.run('document.body.innerText')}\n{self.said}"
        )

    def text(self, selector: str) -> str:
        return str(self.until(f"document.querySelector({selector!r})?.innerText ?? null"))

    def click(self, selector: str) -> None:
        """With the mouse, in its middle, so that what lies above it would be hit."""
        place = self.until(
            f"(() => {{ const e = document.querySelector({selector!r}); if (!e) return null;"
            "e.scrollIntoView({block: 'nearest'}); const r = e.getBoundingClientRect();"
            "return r.width ? [r.x + r.width / 2, r.y + r.height / 2] : null })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=place[0],
                y=place[1],
                button="left",
                clickCount=1,
            )

    def press(self, key: str, **more: Any) -> None:
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        code = {"Enter": 13, "Escape": 27, "ArrowRight": 39, "ArrowUp": 38}.get(key, 0)
        for kind in ("keyDown", "keyUp"):
            said = {"text": text} if text and kind == "keyDown" else {}
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                **said,
                **more,
            )

    def type(self, selector: str, text: str) -> None:
        """Instead of what stands there; a newline is the Enter key."""
        self.run(
            f"(() => {{ const e = document.querySelector({selector!r}); e.focus(); e.select();"
            " })()"
        )
        for part in text.split("\n")[:1]:
            self.call("Input.insertText", text=part)
        for part in text.split("\n")[1:]:
            self.press("Enter")
            self.call("Input.insertText", text=part)

    def files(self, selector: str, *paths: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def screen(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        look = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[look])

    def check_quiet(self, server_url: str) -> None:
        """Asserts that nothing failed or was refused, and that no other server was asked."""
        assert self.said == [], "nothing was refused by the policy, nothing failed"
        own = (server_url, "blob:", "data:")
        assert [url for url in self.asked if not url.startswith(own)] == []

    def picture(self, file: Path) -> None:
        file.write_bytes(
            base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        )


class Chromium:
    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._held = read, write, b""
        self._numbers = itertools.count(1)
        self._tabs: dict[str, Tab] = {}

    def open(self, url: str, *, downloads: Path | None = None) -> Tab:
        """A page of a browser that knows nothing yet."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        if downloads is not None:
            self.call(
                "Browser.setDownloadBehavior",
                behavior="allow",
                browserContextId=context,
                downloadPath=str(downloads),
            )
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)[
            "targetId"
        ]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = self._tabs[session] = Tab(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        tab.call("Page.navigate", url=url)
        tab.until("document.readyState === 'complete' && location.href !== 'about:blank'")
        return tab

    def call(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == number:
                assert "error" not in found, (method, found["error"])
                return found["result"]
            self._heard(found)

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b"\0" not in self._held:
            ready, _, _ = select.select([self._read], [], [], max(end - time.monotonic(), 0))
            part = os.read(self._read, 2**20) if ready else b""
            assert part, "the browser says nothing more"
            self._held += part
        text, _, self._held = self._held.partition(b"\0")
        found: dict[str, Any] = json.loads(text)
        return found

    def _heard(self, event: dict[str, Any]) -> None:
        tab = self._tabs.get(event.get("sessionId", ""))
        if tab is None:
            return
        about = event["params"]
        if event["method"] == "Network.requestWillBeSent":
            tab.asked.append(about["request"]["url"])
        elif event["method"] == "Runtime.exceptionThrown":
            tab.said.append(str(about["exceptionDetails"])[:2000])
        elif (
            event["method"] == "Log.entryAdded" and about["entry"]["source"] != "network"
        ):  # answers that are 4xx
            tab.said.append(str(about["entry"].get("text")))


@contextmanager
def browser() -> Iterator[Chromium]:
    assert CHROMIUM is not None
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()

    def inherit() -> None:  # the protocol's places: 3 to read from, 4 to write to
        os.dup2(to_read, 103), os.dup2(from_write, 104)
        os.dup2(103, 3), os.dup2(104, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        quiet = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.DEVNULL,
        }
        process = subprocess.Popen(command, preexec_fn=inherit, close_fds=False, **quiet)
        os.close(to_read), os.close(from_write)
        try:
            yield Chromium(from_read, to_write)
        finally:
            os.close(to_write), os.close(from_read)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
