"""A headless Chromium for tests of pages: one process, asked over a pipe by its DevTools protocol."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = f"no browser: none of {', '.join(NAMES)} is on PATH. Install Debian's chromium, or run make test as root."
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-dev-shm-usage", "--remote-debugging-pipe", "--mute-audio"),
)
_JOIN = """import os, sys
for here, there in zip(sys.argv[1:3], (3, 4)): os.dup2(int(here), there)
os.execvp(sys.argv[3], sys.argv[3:])"""
WAIT = 20.0  # seconds
KEY_CODES = {"ArrowDown": 40, "ArrowUp": 38, "ArrowLeft": 37, "ArrowRight": 39, "Escape": 27}


@cache
def find_browser() -> str | None:
    """None: there is none that runs."""
    return next((path for name in NAMES if (path := shutil.which(name)) and _runs(path)), None)


def _runs(program: str) -> bool:
    """A snap, or what stands for one that is not installed, sees no folder of a test."""
    how: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        told = subprocess.run([program, "--version"], timeout=WAIT, check=True, **how)
    except (OSError, subprocess.SubprocessError):
        return False
    return b"snap" not in told.stdout


class Browser:
    """One page at a time."""

    def __init__(self, program: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="browser", ignore_cleanup_errors=True)
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        theirs = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10) for descriptor in (to_read, to_write)]
        command = [program, *OPTIONS, f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(  # a browser reads 3 and writes 4
            [sys.executable, "-S", "-c", _JOIN, *map(str, theirs), *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=theirs,
        )
        for descriptor in (to_read, to_write, *theirs):
            os.close(descriptor)
        self._number, self._rest = 0, b""
        self.told: list[str] = []  # of the page: errors, and what its policy has refused
        told = self._ask("Target.attachToTarget", targetId=self._page(), flatten=True)
        self._session = told["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def _page(self) -> str:
        """Its target, which is there a while after the browser."""
        end = time.monotonic() + WAIT
        while True:
            targets = self._ask("Target.getTargets")["targetInfos"]
            if pages := [target["targetId"] for target in targets if target["type"] == "page"]:
                return pages[0]
            assert time.monotonic() < end, "the browser opens no page"
            time.sleep(0.05)

    def close(self) -> None:
        """Ends it."""
        self._ask("Browser.close")
        self._process.wait(WAIT)
        os.close(self._to)
        os.close(self._from)
        self._profile.cleanup()

    # ---------------------------------------------------------------- the protocol
    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Of the page."""
        return self._ask(method, self._session, **params)

    def _ask(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._number:
                assert "error" not in found, (method, found["error"])
                return found["result"]
            self._note(found)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._from], [], [], WAIT)[0], f"the browser says nothing for {WAIT:g} seconds"
            data = os.read(self._from, 1 << 20)
            assert data, "the browser has ended"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.told.append(json.dumps(params["exceptionDetails"])[:2000])
        elif event.get("method") == "Log.entryAdded":
            self.told.append(params["entry"]["text"])

    # ---------------------------------------------------------------- what a person does
    def open(self, address: str, scheme: str = "light", size: tuple[int, int] = (1300, 900)) -> None:
        """Waits until the page says that it is ready."""
        self.told.clear()
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.ask("Emulation.setDeviceMetricsOverride", **metrics)
        self.ask("Page.navigate", url="about:blank")
        self.ask("Page.navigate", url=address)
        self.wait("document.documentElement?.dataset.ready === 'yes'")

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression, which may be a promise."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, (expression, found["exceptionDetails"])
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until it is true."""
        end = time.monotonic() + WAIT
        while not self.value(f"Boolean({expression})"):
            assert time.monotonic() < end, f"never: {expression}; {self.told}"
            time.sleep(0.01)

    def press(self, *keys: str) -> None:
        """One after another."""
        for key in keys:
            told = {"key": key, "windowsVirtualKeyCode": KEY_CODES.get(key, 0)}
            text = {"text": key} if len(key) == 1 else {}
            self.ask("Input.dispatchKeyEvent", type="keyDown", **told, **text)
            self.ask("Input.dispatchKeyEvent", type="keyUp", **told)

    def choose(self, element: str, value: str) -> None:
        """Of a select element or a field, by its id."""
        events = "node.dispatchEvent(new Event('input')); node.dispatchEvent(new Event('change'));"
        self.value(
            f"(() => {{ const node = document.getElementById({element!r}); node.value = {value!r}; {events} }})()"
        )

    def texts(self, selector: str) -> list[str]:
        """Of all elements that it finds."""
        return self.value(f"[...document.querySelectorAll({json.dumps(selector)})].map((node) => node.textContent)")

    def screenshot(self, path: Path) -> None:
        """As PNG."""
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"]))


def addresses(page: Path, **fields: str) -> str:
    """Of a page, with what stands behind its #."""
    return page.resolve().as_uri() + (
        "#" + "&".join(f"{name}={value}" for name, value in fields.items()) if fields else ""
    )


def both_schemes() -> Sequence[str]:
    """Of a person's system."""
    return ("light", "dark")
