"""Chromium over its DevTools protocol: what tests of the explorer's page need of a browser, and no more.

Commands go out one at a time and are waited for; what a page comes to is asked until it is so (`Tab.until`), never slept for.
"""

from __future__ import annotations

import asyncio
import base64
import shutil
import subprocess
import time
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
    "--remote-debugging-port=0",
)  # fmt: skip
DEADLINE_S = 60.0
POLL_S = 0.02
KEYS = {"Tab": 9, "Enter": 13, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class Browser:
    """A Chromium of its own, with a profile in an empty folder. Ends with the `with` block."""

    def __init__(self, profile: Path) -> None:
        self._profile = profile
        self._loop = asyncio.new_event_loop()
        self._asked = 0
        self._faults: dict[str, list[str]] = {}

    def __enter__(self) -> Browser:
        command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={self._profile}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self._run(self._connect(self._address()))
        except BaseException:
            self._process.kill()
            self._process.wait()
            self._loop.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, wrong: BaseException | None, trace: TracebackType | None) -> None:
        self._run(self._disconnect())
        self._loop.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> Tab:
        """A page in a tab of its own, loaded as far as its first script."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, target, session)
        for domain in ("Page", "Runtime"):
            tab.send(f"{domain}.enable")
        tab.send("Emulation.setFocusEmulationEnabled", enabled=True)
        tab.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        tab.send("Emulation.setEmulatedMedia", features=[scheme])
        tab.send("Page.navigate", url=url)
        tab.until("location.href !== 'about:blank' && document.readyState === 'complete'")
        return tab

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of a command. Raises AssertionError where the browser refuses it."""
        return self._run(self._send(method, session, params))

    def faults(self, session: str) -> list[str]:
        """What a page's scripts threw and did not catch."""
        return self._faults.setdefault(session, [])

    def _address(self) -> str:
        file, end = self._profile / "DevToolsActivePort", time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise AssertionError(f"Chromium ended with {self._process.returncode}")
            lines = file.read_text().splitlines() if file.is_file() else []
            if len(lines) == 2:
                return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
            time.sleep(POLL_S)
        raise AssertionError("Chromium opened no port")

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(asyncio.wait_for(work, DEADLINE_S))

    async def _connect(self, url: str) -> None:
        self._client = aiohttp.ClientSession()
        try:
            self._socket = await self._client.ws_connect(url, max_msg_size=0)
        except BaseException:
            await self._client.close()
            raise

    async def _disconnect(self) -> None:
        await self._socket.close()
        await self._client.close()

    async def _send(self, method: str, session: str | None, params: dict[str, Any]) -> dict[str, Any]:
        self._asked += 1
        number = self._asked
        where = {} if session is None else {"sessionId": session}
        await self._socket.send_json({"id": number, "method": method, "params": params, **where})
        while True:
            told = await self._socket.receive_json()
            if told.get("method") == "Runtime.exceptionThrown":
                details = told["params"]["exceptionDetails"]
                text = details.get("exception", {}).get("description", details["text"])
                self.faults(told["sessionId"]).append(text)
            if told.get("id") == number:
                assert "error" not in told, f"{method}: {told.get('error')}"
                return dict(told["result"])


class Tab:
    """A page: what its scripts say, and keys that a person presses."""

    def __init__(self, browser: Browser, target: str, session: str) -> None:
        self._browser, self._target, self._session = browser, target, session

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """A command to this page."""
        return self._browser.send(method, self._session, **params)

    def value(self, script: str) -> Any:
        """Of an expression, as JSON."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, f"{script}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def until(self, script: str, deadline_s: float = DEADLINE_S) -> None:
        """Wait for an expression to be true."""
        end = time.monotonic() + deadline_s
        while not self.value(f"Boolean({script})"):
            said = f"{script}; the page says {self.text('#headline')!r}, {self.text('#took')!r} and throws {self.faults}"
            assert time.monotonic() < end, f"never came to be: {said}"
            time.sleep(POLL_S)

    def text(self, selector: str) -> str:
        """What a person reads there."""
        return str(self.value(f"document.querySelector({selector!r})?.innerText ?? ''"))

    def focus(self, selector: str) -> None:
        """Put the keyboard there."""
        self.value(f"document.querySelector({selector!r}).focus()")
        assert self.value(f"document.activeElement === document.querySelector({selector!r})"), f"{selector} takes no focus"

    def press(self, key: str) -> None:
        """Press a key that writes nothing, and let it go."""
        named = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        self.send("Input.dispatchKeyEvent", type="keyDown", **named, **({"text": "\r"} if key == "Enter" else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **named)

    def write(self, text: str) -> None:
        """Type into what has the focus."""
        self.send("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """Press the button of a mouse in the middle of an element."""
        script = f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}}); "
        box = self.value(script + "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def choose(self, selector: str, value: str) -> None:
        """Choose from a list, as its events tell it; the list that a browser draws takes no keys of ours."""
        found = f"document.querySelector({selector!r})"
        self.value(f"{found}.value = {value!r}; {found}.dispatchEvent(new Event('input', {{bubbles: true}}))")
        assert self.value(f"{found}.value") == value, f"{selector} has no {value}"

    def resize(self, width: int, height: int) -> None:
        """The window's size."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def screenshot(self, file: Path) -> None:
        """The whole page, as it is drawn."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    @property
    def faults(self) -> list[str]:
        """What scripts threw and nobody caught."""
        return self._browser.faults(self._session)

    def close(self) -> None:
        """Close the tab."""
        self._browser.send("Target.closeTarget", targetId=self._target)
