from __future__ import annotations

from xml.etree import ElementTree

from tlexport.evidence.report.figures import history

SVG = "{http://www.w3.org/2000/svg}"


def point(value: float, verdict: str = "pass", label: str = "2026-01-01T00:00:00Z") -> dict[str, object]:
    return {"label": label, "value": value, "low": value * 0.9, "high": value * 1.1, "verdict": verdict}


def drawn(*points: dict[str, object]) -> ElementTree.Element:
    return ElementTree.fromstring(history.standalone(history.timeline(points, "ms", "a <model>")))


def test_one_mark_a_recording_in_order_and_a_slower_one_is_higher() -> None:
    svg = drawn(point(1.0), point(1.0), point(2.0, "fail"), point(1.0, "undecided"))
    circles = svg.findall(f".//{SVG}circle")
    assert [circle.get("class") for circle in circles] == ["pass", "pass", "fail", "other"]
    across, down = ([float(circle.get(key, "nan")) for circle in circles] for key in ("cx", "cy"))
    assert across == sorted(set(across)) and down[2] < down[0] == down[1] == down[3]
    assert svg.find(f".//{SVG}line[@class='gate']").get("y1") == f"{down[0]:.1f}", "at the baseline"


def test_text_is_escaped_and_what_is_not_finite_is_left_out() -> None:
    svg = drawn(point(1.0, label="<b>"), point(float("nan")))
    assert len(svg.findall(f".//{SVG}circle")) == 1 and svg.get("aria-label") == "a <model>"
    assert history.timeline([point(float("inf"))], "ms", "t") == history.standalone("") == ""
