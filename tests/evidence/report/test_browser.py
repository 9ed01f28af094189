"""The page in a real Chromium: nothing is asked for, nothing complains, nothing is cut off."""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from documents import document, forecasts
from pipeline import Built

from tlexport.evidence.report.page import POLICY, render, sections

sys.path.insert(0, str(Path(__file__).parents[3] / "bench"))
import chromium

sys.path.pop(0)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(chromium.missing()), reason=chromium.missing() or "all is there"),
]
WIDTHS = (390, 1200)


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Browser]:
    with chromium.Browser() as opened:
        yield opened


def checked(visit: chromium.Visit) -> dict[str, Any]:
    """What holds of every page; its layout."""
    layout = visit.layout
    assert visit.requests == () and visit.console == () and layout["scripts"] == 0
    assert layout["wide"] == 0, "the page scrolls sideways"
    assert all(width > 0 and height > 0 for _, width, height in layout["headings"] + layout["drawings"])
    assert all(label for label, *_ in layout["drawings"])
    assert all(width > 0 for _, width in layout["images"]), "an image was not decoded"
    assert {link.removeprefix("#") for link in layout["links"]} <= set(layout["ids"])
    return layout


@pytest.mark.parametrize("width", WIDTHS)
def test_the_report_of_a_real_run(browser: chromium.Browser, built: Built, width: int) -> None:
    visit = browser.open(built.run / "report.html", width)
    layout = checked(visit)
    titles = [title for title, *_ in layout["headings"]]
    for title in ("Variants", "Calibration", "ROC, precision and recall", "Confusion, before and after",
                  "Latency and throughput", "Layers as they were built", "Environment", "Files behind the numbers"):  # fmt: skip
        assert title in titles
    assert len(layout["drawings"]) >= 8 and len(layout["links"]) == len(titles) - 1


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["images", "many classes", "forecasts"])
def test_pages_of_every_kind(browser: chromium.Browser, tmp_path: Path, kind: str, width: int) -> None:
    made = {
        "images": document,
        "many classes": lambda: document(tuple(f"class with a rather long name {i}" for i in range(20))),
        "forecasts": forecasts,
    }[kind]()
    (tmp_path / "page.html").write_text(render(made), encoding="utf-8")
    layout = checked(browser.open(tmp_path / "page.html", width))
    assert [title for title, *_ in layout["headings"]][1:] == [part.title for part in sections(made)]
    assert bool(layout["images"]) == (kind != "forecasts")


def test_a_class_that_is_named_as_a_script_is_only_text(browser: chromium.Browser, tmp_path: Path) -> None:
    name = "<script>alert(1)</script>"
    made = document((name, "<img src=x onerror=alert(2)>"))
    made = dataclasses.replace(made, recipe={**made.recipe, "name": name})
    (tmp_path / "page.html").write_text(render(made), encoding="utf-8")
    layout = checked(browser.open(tmp_path / "page.html"))
    assert browser.driver.execute_script("return typeof window.planted") == "undefined"
    assert name in browser.text() and all(alt.startswith("test sample") for alt, _ in layout["images"])


class _Answering(BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(404)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


def test_a_planted_request_is_caught_and_the_policy_stops_it(
    browser: chromium.Browser, tmp_path: Path
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answering)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/x"
        text = render(document()).replace("<main>", f'<main><img src="{address}">', 1)
        (tmp_path / "stopped.html").write_text(text, encoding="utf-8")
        stopped = browser.open(tmp_path / "stopped.html")
        assert _Answering.asked == [] and any("Content Security Policy" in said for said in stopped.console)
        assert POLICY in text
        (tmp_path / "open.html").write_text(text.replace(POLICY, ""), encoding="utf-8")
        caught = browser.open(tmp_path / "open.html")
        assert _Answering.asked == ["/x"] and address in caught.requests
        for visit in (stopped, caught):
            with pytest.raises(AssertionError):
                checked(visit)
    finally:
        server.shutdown()
        server.server_close()


def test_planted_faults_of_layout_are_caught(browser: chromium.Browser, tmp_path: Path) -> None:
    text = render(document())
    for name, planted in {
        "too wide": text.replace("<main>", '<main><div style="width:2000px">wide</div>', 1),
        "no size": text.replace("<main>", '<main><svg aria-label="x" width="0" height="0"></svg>', 1),
        "broken image": text.replace("<main>", '<main><img alt="x" src="data:image/png;base64,AAAA">', 1),
        "dead link": text.replace("<main>", '<main><nav><a href="#nowhere">x</a></nav>', 1),
    }.items():
        (tmp_path / "page.html").write_text(planted, encoding="utf-8")
        with pytest.raises(AssertionError):
            checked(browser.open(tmp_path / "page.html"))
            pytest.fail(name)


def test_it_prints_on_paper_without_the_contents_list(browser: chromium.Browser, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(render(document()), encoding="utf-8")
    browser.open(tmp_path / "page.html", 794)
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        found = browser.driver.execute_script(
            "return [getComputedStyle(document.querySelector('nav')).display,"
            " document.documentElement.scrollWidth - document.documentElement.clientWidth,"
            " getComputedStyle(document.querySelector('.scroll')).overflowX,"
            " [...document.querySelectorAll('.scroll > *')].map(e => e.getBoundingClientRect().right)]"
        )
        assert found[0] == "none" and found[1] == 0 and found[2] == "visible"
        assert max(found[3]) <= 794, "a table is wider than the paper"
        paper = browser.driver.execute_cdp_cmd(
            "Page.printToPDF", {"preferCSSPageSize": True, "printBackground": True}
        )
        assert paper["data"].startswith("JVBERi0")  # %PDF-
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_dark_and_light_differ_and_stay_legible(browser: chromium.Browser, tmp_path: Path) -> None:
    """Contrast of text on paper by WCAG 2.1: at least 4.5, also of the quiet text and of the series' colours 3."""
    (tmp_path / "page.html").write_text(render(document()), encoding="utf-8")
    papers = set()
    for scheme in ("light", "dark"):
        features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
        browser.open(tmp_path / "page.html")
        values = browser.driver.execute_script(
            "const s = getComputedStyle(document.documentElement);"
            "return Object.fromEntries(['paper','raised','ink','quiet','pass','fail','s0','s1','s2','s3']"
            ".map(k => [k, s.getPropertyValue('--' + k).trim()]))"
        )
        papers.add(values["paper"])
        for name, least in {
            "ink": 4.5,
            "quiet": 4.5,
            "pass": 4.5,
            "fail": 4.5,
            "s0": 3,
            "s1": 3,
            "s2": 3,
            "s3": 3,
        }.items():
            for ground in ("paper", "raised"):
                assert contrast(values[name], values[ground]) >= least, (scheme, name, ground)
    assert len(papers) == 2
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def contrast(one: str, other: str) -> float:
    """WCAG 2.1, contrast ratio of two colours #rgb or #rrggbb."""
    lights = []
    for colour in (one, other):
        digits = colour.lstrip("#")
        digits = "".join(d * 2 for d in digits) if len(digits) == 3 else digits
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
        ]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)
