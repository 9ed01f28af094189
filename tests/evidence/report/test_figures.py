"""Figures put values where they belong."""

from __future__ import annotations

import math
import re

import pytest
from documents import FAILING, PASSING

from tlexport.evidence.report.figures import axes, curves, latency, matrix, variants


def test_the_gate_and_the_intervals_stand_in_order() -> None:
    svg = variants.dot_intervals([PASSING, FAILING], 0.005)
    gate = float(re.search(r'class="gate" x1="([\d.]+)"', svg).group(1))
    right_ends = {kind: float(re.search(rf'class="{kind}" x1="[\d.]+" y1="[\d.]+" x2="([\d.]+)"', svg).group(1))
                  for kind in ("pass", "fail")}  # fmt: skip
    assert right_ends["pass"] < gate < right_ends["fail"]


def test_the_front_line_skips_what_is_beaten_in_drop_and_time() -> None:
    """c is on the front by its size alone."""
    rows = [("a", 1.0, 0.02), ("b", 2.0, 0.01), ("c", 3.0, 0.015)]
    points = [
        {"name": n, "time": t, "drop_high": d, "size_bytes": 9, "verdict": "pass", "front": True}
        for n, t, d in rows
    ]
    svg = variants.front(points, None, "ms")
    corners = re.search(r'<polyline class="curve" fill="none" points="([^"]+)"', svg).group(1).split()
    assert len(corners) == 3 and all(f">{name}</text>" in svg for name in "abc")


@pytest.mark.parametrize(
    ("values", "medians"), [([1.0, 2.0, 50.0], 2.0), ([3.0], 3.0), ([4.0, 1.0, 2.0, 3.0], 2.0)]
)
def test_a_histogram_counts_every_call_and_marks_the_median(values: list[float], medians: float) -> None:
    svg = latency.histograms({"a": values, "wide": [0.5, 100.0]}, {"a": "s1"})
    assert f"a: {len(values)} calls, median {medians:g} ms" in svg
    bars = re.search(r'class="bars s1" d="([^"]*)"', svg).group(1)
    assert 1 <= bars.count("M") <= len(values) and svg.count('class="median"') == 2
    assert 'class="quantile"' not in svg


def test_p99_is_marked_only_where_ten_calls_are_beyond() -> None:
    counts = {
        n: latency.histograms({"a": [1 + i / n for i in range(n)]}, {}).count('"quantile"')
        for n in (99, 100, 999, 1000)
    }
    assert counts == {99: 0, 100: 1, 999: 1, 1000: 2}


def test_a_long_time_line_keeps_the_slowest_call() -> None:
    n = 30_000
    times = [1.0] * n
    times[17_000] = 90.0
    svg = latency.time_lines({"a": times}, {"a": list(map(float, range(n)))}, {"a": "s1"})
    marks = re.search(r'class="dots small s1" d="([^"]*)"', svg).group(1)
    heights = {float(y) for y in re.findall(r"M[\d.]+ ([\d.]+)h0", marks)}
    assert marks.count("M") <= latency.DRAWN + 3 and len(heights) == 2 and len(svg) < 60_000


def test_calls_without_a_start_have_no_time_line() -> None:
    assert (
        latency.time_lines({"a": [1.0]}, {}, {}) == ""
        and latency.time_lines({"a": [1.0]}, {"a": []}, {}) == ""
    )


def test_a_flat_curve_and_a_single_epoch_are_drawn() -> None:
    assert "polyline" in curves.curve([(1, 0.5)], "loss")
    assert "polyline" in curves.curve([(1, 0.5), (2, 0.5)], "loss")
    assert curves.curve([(1, None), (2, math.nan)], "loss") == ""


def test_a_reliability_dot_above_the_diagonal_is_drawn_above_it() -> None:
    held = {"confidence": 0.5, "accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 0.95, "samples": 20}
    svg = curves.reliability([held], "s1", "x")
    x, y = map(float, re.search(r'class="dots big s1" d="M([\d.]+) ([\d.]+)h0"', svg).groups())
    x1, y1, x2, y2 = map(
        float,
        re.search(r'class="guide" x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)" y2="([\d.]+)"', svg).groups(),
    )
    assert y < y1 + (x - x1) / (x2 - x1) * (y2 - y1) - 50  # pixels grow downward


def test_a_scatter_of_positive_values_over_decades_is_logarithmic_and_others_are_not() -> None:
    wide = curves.scatter([(1e-6, 1e-5), (1e-1, 1e-2)], "s1", across="a", up="b", label="c")
    assert "1e-05" in wide and "0.001" in wide
    mixed = curves.scatter([(-1.0, 0.5), (1e3, 2.0)], "s1", across="a", up="b", label="c")
    assert ">0<" in mixed


def test_a_matrix_frames_and_signs_what_changed() -> None:
    svg = matrix.confusion([[8, 2], [1, 9]], ["a", "b"], "x", [[9, 1], [1, 9]])
    assert svg.count("changed") == 2 and ">-1<" in svg and ">+1<" in svg and svg.count('class="worse"') == 2
    assert matrix.confusion([[8, 2], [1, 9]], ["a", "b"], "x").count("changed") == 0
    assert "a decided as b: 2 (+1)" in svg


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.02, 0.03), (7.0, 7.0), (1e-9, 3e-9), (-5e6, 2e6)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = axes.ticks(low, high)
    assert found and all(low - 1e-12 * abs(low) <= value <= high * (1 + 1e-12) + 1e-15 for value in found)
    assert found == sorted(found) and len(found) <= 7


@pytest.mark.parametrize(("low", "high"), [(0.54, 0.77), (0.02, 800.0), (3.0, 3.0), (0.9, 1.1)])
def test_logarithmic_ticks_are_inside_and_at_least_one(low: float, high: float) -> None:
    found = axes.log_ticks(low, high)
    assert found and all(low <= value <= high for value in found)
