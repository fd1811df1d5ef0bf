"""A headless Chromium that tests speak to through a pipe (Chrome DevTools Protocol), with no package for it.

with Browser(chromium(), tmp_path / "profile") as browser:
    browser.open(page, width=390, dark=True)
    assert browser.ask("document.querySelectorAll('table').length") == 3 and browser.requests == [page.as_uri()]
"""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-extensions --remote-debugging-pipe"
).split()


def chromium() -> str | None:
    """The path of an installed Chromium or Chrome."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page in a browser. `requests`: the URLs that were asked for; `messages`: what the console said."""

    def __init__(self, program: str, profile: Path) -> None:
        self.requests: list[str] = []
        self.messages: list[str] = []
        self._number, self._buffer = 0, b""
        self._reads_from, self._writes_to = self._start([program, *FLAGS, f"--user-data-dir={profile}"])
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = None
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Network", "Log", "Runtime", "Page"):
            self._call(f"{domain}.enable")

    def _start(self, command: list[str]) -> tuple[int, int]:
        """The browser reads commands from its descriptor 3 and answers on 4: pipes, put there by a shell."""
        self._session = None
        command_out, command_in = os.pipe()
        answer_out, answer_in = os.pipe()
        shell = ["bash", "-c", f'exec "$@" 3<&{command_out} 4>&{answer_in} 2>/dev/null', "browser", *command]
        self._process = subprocess.Popen(shell, pass_fds=(command_out, answer_in))
        os.close(command_out)
        os.close(answer_in)
        return answer_out, command_in

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._reads_from)
        os.close(self._writes_to)

    def open(self, page: Path, *, width: int = 1200, dark: bool = False) -> None:
        """Load a page anew, in a window of that width."""
        self.requests.clear()
        self.messages.clear()
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[theme])
        phone = width < 600
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=phone)
        self._call("Page.navigate", url=page.as_uri())
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self._call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        data = self._call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._writes_to, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            pass
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        """The next answer or event; events of the network and the console are noted."""
        while b"\0" not in self._buffer:
            data = os.read(self._reads_from, 1 << 20)
            assert data, "the browser has ended"
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        if message.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.messages.append(json.dumps(message["params"]))
        return message
