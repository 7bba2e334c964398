"""Render the report, look at it in headless Chromium, and fail on anything that a reader's console would show.

python scripts/screenshot_report.py --results results/experiments --output build/report

It is opened on a desktop, on a phone, in the dark and as it prints; the screenshots are kept in the output folder. An
error or warning in the console, an exception, something that did not load, a request for anything but the page itself,
and a page wider than the screen are faults.
"""

import argparse
import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mabert.experiments.report import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VIEWS = {
    # width, height, media, colours
    "desktop": (1440, 900, "screen", "light"),
    "phone": (390, 844, "screen", "light"),
    "dark": (1440, 900, "screen", "dark"),
    "print": (760, 1075, "print", "light"),
}
SLICE = 6_000  # CSS pixels; a texture holds no more than 16,384 device pixels
PATIENCE = 300.0  # seconds, for all views


class Browser:
    """Chromium, spoken to by the DevTools protocol over two pipes."""

    def __init__(self, commands: IO[bytes], answers: IO[bytes]) -> None:
        self.commands, self.answers = commands, answers
        self.events: list[dict[str, Any]] = []
        self.session, self.count = "", 0

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and give its result; what is reported in the meantime is kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.commands.write(json.dumps(message).encode() + b"\0")
        self.commands.flush()
        while (answer := self._receive()).get("id") != self.count:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def wait_for(self, method: str) -> None:
        """Until that is reported."""
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._receive())

    def _receive(self) -> dict[str, Any]:
        received = bytearray()
        while (byte := self.answers.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("Chromium ended by itself, or had to be ended because it took too long.")
            received += byte
        return json.loads(received)


@contextlib.contextmanager
def chromium(executable: str) -> Iterator[Browser]:
    """A headless Chromium with one empty page."""
    with tempfile.TemporaryDirectory() as profile:
        to_browser, from_browser = os.pipe(), os.pipe()
        # The protocol takes descriptors 3 and 4, which the pipes themselves may have got.
        inner = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_browser[0], from_browser[1])]

        def place() -> None:
            os.dup2(inner[0], 3)
            os.dup2(inner[1], 4)

        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        process = subprocess.Popen(
            [executable, *options, f"--user-data-dir={profile}"],
            preexec_fn=place,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (to_browser[0], from_browser[1], *inner):
            os.close(end)
        too_long = threading.Timer(PATIENCE, process.kill)
        too_long.start()
        try:
            with os.fdopen(to_browser[1], "wb") as commands, os.fdopen(from_browser[0], "rb") as answers:
                browser = Browser(commands, answers)
                target = browser.ask("Target.createTarget", url="about:blank")["targetId"]
                browser.session = browser.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
                for domain in ("Page", "Runtime", "Log", "Network"):
                    browser.ask(f"{domain}.enable")
                yield browser
        finally:
            too_long.cancel()
            process.terminate()
            process.wait()


def look(browser: Browser, page: Path, view: str, folder: Path) -> list[str]:
    """Take the screenshots of one view and give what was wrong with it."""
    width, height, media, scheme = VIEWS[view]
    is_phone = view == "phone"
    browser.ask(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=height,
        deviceScaleFactor=1 + is_phone,
        mobile=is_phone,
    )
    colours = {"name": "prefers-color-scheme", "value": scheme}
    browser.ask("Emulation.setEmulatedMedia", media=media, features=[colours])
    browser.events.clear()
    browser.ask("Page.navigate", url=page.resolve().as_uri())
    browser.wait_for("Page.loadEventFired")
    size = browser.ask("Page.getLayoutMetrics")["cssContentSize"]
    for number, top in enumerate(range(0, int(size["height"]), SLICE), 1):
        clip = {"x": 0, "y": top, "width": width, "height": min(SLICE, size["height"] - top), "scale": 1}
        shot = browser.ask("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        (folder / f"{view}-{number}.png").write_bytes(base64.b64decode(shot["data"]))
    wrong = [fault for event in browser.events if (fault := fault_of(event, page.resolve().as_uri()))]
    if size["width"] > width:
        wrong.append(f"the page is {size['width']} pixels wide on a screen of {width}")
    return [f"{view}: {fault}" for fault in dict.fromkeys(wrong)]


def fault_of(event: dict[str, Any], page: str) -> str | None:
    """What an event of the browser says is wrong, if anything."""
    params = event.get("params", {})
    match event.get("method"):
        case "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            return f"exception: {details.get('exception', {}).get('description', details['text'])}"
        case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
            return f"console: {' '.join(str(argument.get('value', '')) for argument in params['args'])}"
        case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
            return f"console: {params['entry']['text']} {params['entry'].get('url', '')}"
        case "Network.loadingFailed":
            return f"not loaded: {params['errorText']}"
        case "Network.requestWillBeSent" if not params["request"]["url"].startswith((page, "data:")):
            return f"asks for {params['request']['url']}"
    return None


def main() -> int:
    """Render, look, and say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/experiments"))
    parser.add_argument("--output", type=Path, default=Path("build/report"), help="folder of the page and screenshots")
    parser.add_argument("--page", type=Path, help="look at this page instead of rendering one")
    arguments = parser.parse_args()
    executable = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if not executable:
        print(
            "The report is looked at in Chromium, and there is none. On Debian: apt-get install chromium. Elsewhere "
            "name one: make report-check CHROMIUM=/path/to/chrome",
            file=sys.stderr,
        )
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    for earlier in (path for view in VIEWS for path in arguments.output.glob(f"{view}-*.png")):
        earlier.unlink()
    try:
        page = arguments.page or write_report(arguments.results, arguments.output / "index.html")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    with chromium(executable) as browser:
        wrong = [fault for view in VIEWS for fault in look(browser, page, view, arguments.output)]
    for fault in wrong:
        print(fault, file=sys.stderr)
    print(f"{page}: {len(list(arguments.output.glob('*.png')))} screenshots in {arguments.output}, {len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
