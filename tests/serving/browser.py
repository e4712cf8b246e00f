"""A real browser without a window, driven over a pipe (Chrome DevTools Protocol): nothing to install besides the browser."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# The browser speaks the protocol on the descriptors 3 and 4.
ON_3_AND_4 = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
for fd, end in zip((3, 4), ends):
    os.dup2(end, fd)
os.execv(sys.argv[3], sys.argv[3:])
"""
ANSWER_S = 60  # seconds that a command of the protocol may take
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def found() -> str | None:
    """The program; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """The one page of a browser. Whatever it logs as an error is kept."""

    def __init__(self, process: subprocess.Popen, to_browser: int, from_browser: int):
        self.process, self.errors, self.requested = process, [], []
        self._to, self._from = to_browser, from_browser
        self._arrives = select.poll()
        self._arrives.register(from_browser, select.POLLIN)
        self._last, self._session, self._held, self._loaded = 0, None, b"", False
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Inspector"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command of the protocol. Raises RuntimeError where the browser gives none within a minute."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params} | ({"sessionId": self._session} if self._session else {})
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + ANSWER_S
        while True:
            answer = json.loads(self._next(method, deadline))
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(answer["error"]["message"])
                return answer["result"]
            self._event(answer)

    def run(self, expression: str) -> Any:
        """The value of JavaScript; a promise is waited for."""
        done = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(json.dumps(done["exceptionDetails"])[:500])
        return done["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Until JavaScript is true, for at most a minute. Asked anew each time: a page that is left keeps no promises."""
        deadline = time.monotonic() + ANSWER_S
        while not self.run(f"Boolean({condition})"):
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited in vain for {condition}")
            time.sleep(0.02)

    def open(self, url: str) -> None:
        """Until it is loaded. The page is asked nothing before: what a page that is left is asked may have no answer."""
        self._loaded = False
        self.send("Page.navigate", url=url)
        deadline = time.monotonic() + ANSWER_S
        while not self._loaded:
            self._event(json.loads(self._next("Page.navigate", deadline)))

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.send("Input.insertText", text=text)

    def press(self, key: str, code: int, modifiers: int = 0) -> None:
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.send("Input.dispatchKeyEvent", type="keyDown", text="\r" if key == "Enter" else "", **event)
        self.send("Input.dispatchKeyEvent", type="keyUp", **event)

    def click(self, selector: str) -> None:
        """With the mouse, where the element is."""
        at = self.run(
            f"(() => {{ const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect(); "
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button="left", clickCount=1)

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))

    def _event(self, message: dict[str, Any]) -> None:
        kind, params = message.get("method"), message.get("params", {})
        if kind == "Page.loadEventFired":
            self._loaded = True
        if kind == "Inspector.targetCrashed":
            raise RuntimeError("the page has crashed")
        if kind == "Runtime.exceptionThrown" or (kind == "Log.entryAdded" and params["entry"]["level"] == "error"):
            self.errors.append(json.dumps(params)[:500])
        if kind == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])

    def _next(self, method: str, deadline: float) -> bytes:
        while b"\0" not in self._held:
            if not self._arrives.poll(max(0, 1000 * (deadline - time.monotonic()))):
                raise RuntimeError(f"the browser does not answer {method}")
            read = os.read(self._from, 1 << 16)
            if not read:
                raise RuntimeError("the browser has ended")
            self._held += read
        message, _, self._held = self._held.partition(b"\0")
        return message


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A page of a browser with a profile of its own."""
    program = found()
    assert program is not None
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
    command = [sys.executable, "-c", ON_3_AND_4, str(theirs_in), str(theirs_out), program, *flags, "--no-first-run"]
    process = subprocess.Popen(
        command, pass_fds=(theirs_in, theirs_out), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Page(process, ours_out, ours_in)
    finally:
        os.close(ours_out)  # it ends when its pipe does
        os.close(ours_in)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
