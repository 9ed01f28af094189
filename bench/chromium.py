"""A page in a real Chromium: what it asked the network for, what the console said, how it is laid out, how long it took."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM, DRIVER = "chromium", "chromedriver"
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
LAYOUT = """
for (const folded of document.querySelectorAll('details')) folded.open = true;
const box = (node) => node.getBoundingClientRect();
return {
  scripts: document.scripts.length,
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  headings: [...document.querySelectorAll('h1, section > h2')].map((h) => [h.textContent, box(h).width, box(h).height]),
  drawings: [...document.querySelectorAll('svg')].map((s) => [s.getAttribute('aria-label'), box(s).width, box(s).height]),
  images: [...document.querySelectorAll('img')].map((i) => [i.alt, i.complete ? i.naturalWidth : 0]),
  resources: performance.getEntriesByType('resource').map((r) => r.name).filter((n) => !n.startsWith('data:')),
  links: [...document.querySelectorAll('nav a')].map((a) => a.getAttribute('href')),
  ids: [...document.querySelectorAll('[id]')].map((e) => e.id),
};
"""
TIMES = """
const load = performance.getEntriesByType('navigation')[0], paint = performance.getEntriesByName('first-contentful-paint')[0];
return {load_ms: load.loadEventEnd, paint_ms: paint ? paint.startTime : null};
"""


def missing() -> str:
    """Why no page can be opened here; empty if one can."""
    absent = [name for name in (CHROMIUM, DRIVER) if shutil.which(name) is None]
    try:
        import selenium  # noqa: F401
    except ImportError:
        absent.append("selenium (pip)")
    return f"needs {', '.join(absent)}" if absent else ""


@dataclass(frozen=True)
class Visit:
    """requests: URLs other than the page itself and data inside it. console: warnings and errors. layout: see LAYOUT."""

    requests: tuple[str, ...]
    console: tuple[str, ...]
    layout: dict[str, Any]
    seconds: float  # from the call to the load event, as the driver sees it
    load_ms: float  # the page's own load event, since the navigation began
    paint_ms: float | None  # its first contentful paint


class Browser:
    """Used with `with`: a Chromium of its own, without a profile, extensions or background traffic."""

    def __enter__(self) -> Browser:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which(CHROMIUM))
        for flag in (*QUIET, f"--user-data-dir={self._profile.name}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which(DRIVER)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.driver.quit()
        self._profile.cleanup()

    def open(self, page: Path, width: int = 1200, height: int = 900) -> Visit:
        """The page from its file, with an empty cache, in a window of this size in CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get("about:blank")
        self.driver.execute_cdp_cmd("Network.clearBrowserCache", {})
        for kind in ("performance", "browser"):
            self.driver.get_log(kind)
        address = page.resolve().as_uri()
        started = time.perf_counter()
        self.driver.get(address)
        seconds = time.perf_counter() - started
        times = self.driver.execute_script(TIMES)
        layout = self.driver.execute_script(LAYOUT)
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        console = [f"{entry['level']}: {entry['message']}" for entry in self.driver.get_log("browser")]
        outside = [url for url in asked if url != address and not url.startswith(("data:", "about:"))]
        return Visit(
            tuple(dict.fromkeys([*outside, *layout["resources"]])),
            tuple(console),
            layout,
            seconds,
            times["load_ms"],
            times["paint_ms"],
        )

    def text(self) -> str:
        """What can be read on the page that is open."""
        return str(self.driver.execute_script("return document.body.innerText"))
