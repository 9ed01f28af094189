from __future__ import annotations

import copy
import math
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from tlexport.evidence.report import figures
from tlexport.evidence.report.page import render

VOID = {"meta", "br", "img", "circle", "line"}
EVIL = "\"><script>alert(1)</script><img src=x onerror=alert(2)>' onload='x"


class Page(HTMLParser):
    """Collects tags, attributes and text, and fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def document() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    passing = {
        "name": "openvino-int8-cpu", "backend": "openvino", "target": "cpu", "precision": "int8", "metric": 0.9571,
        "drop": 0.0012, "drop_low": -0.0008, "drop_high": 0.0031, "max_abs_error": 0.0211, "flips": 4,
        "p50_ms": 2.413, "p99_ms": 3.9, "speedup": 3.214, "size_bytes": 3_600_000, "receipt": "int8 x 50, fp32 x 3",
        "verdict": "pass", "reason": "",
    }  # fmt: skip
    failing = {**passing, "name": "onnxruntime-int8-cpu", "drop": 0.021, "drop_low": 0.012, "drop_high": 0.03,
               "verdict": "fail", "reason": "drop up to 0.0300, the gate is 0.0050", "p99_ms": None}  # fmt: skip
    compiled = {**dict.fromkeys(passing), "name": "rtx-fp16-sm89", "target": "sm89", "precision": "fp16",
                "verdict": "compiled, not run here"}  # fmt: skip
    reference = {
        **dict.fromkeys(passing),
        "name": "torch-eager",
        "metric": 0.9583,
        "p50_ms": 7.8,
        "verdict": "reference",
    }
    return {
        "name": "chest-xray",
        "description": "pneumonia or not",
        "variants": [passing, failing, compiled],
        "reference": reference,
        "chosen": {"cpu": "openvino-int8-cpu"},
        "gates": {"max_drop": 0.005, "max_p99_ms": None},
        "withheld": ["onnxruntime-int8-cpu p99: 24 calls; p99 needs 299"],
        "latency_ms": {
            "torch-eager": list(rng.gamma(50, 0.16, 300)),
            "openvino-int8-cpu": [*rng.gamma(50, 0.05, 299), 31.0],
        },
        "finetune": {
            "run": "/home/somebody/runs/cxr",
            "task": "binary",
            "metric": "auc",
            "classes": ["normal", "pneumonia"],
            "samples": {"train": 4708, "test": 624},
            "metrics": {"val": {"auc": 0.99}, "test": {"auc": 0.9583, "accuracy": 0.88}},
        },
        "history": [{"epoch": e, "train_loss": 1 / e, "val": {"auc": 1 - 0.2 / e}} for e in range(1, 7)],
        "recipe": {"data": {"path": "pneumoniamnist.npz", "split": {"val": 0.15}}},
        "machine": {
            "cpu": "AMD EPYC",
            "usable_cores": 2,
            "gpus": [{"name": "NVIDIA L4", "memory_mib": 23034}],
        },
        "threads": 2,
        "versions": {"torch": "2.14.1"},
    }


def test_the_page_is_well_formed_and_needs_nothing_else() -> None:
    text = render(document())
    page = Page(text)
    assert not re.search(r"https?:|//|@import|url\(", text)
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert not {"src", "href"} & page.attributes
    assert page.tags.count("svg") == 5
    assert "prefers-color-scheme: dark" in text and "@media print" in text


def test_what_was_measured_is_on_the_page() -> None:
    text = Page(render(document())).text
    for shown in ("openvino-int8-cpu", "0.9571", "+0.0012 [-0.0008, +0.0031]", "3.21×", "3.6", "compiled, not run here",
                  "drop up to 0.0300, the gate is 0.0050", "int8 x 50, fp32 x 3", "0.9583", "normal, pneumonia",
                  "AMD EPYC", "2.14.1", "max drop"):  # fmt: skip
        assert shown in text, shown


def test_the_page_does_not_say_who_made_it() -> None:
    assert "somebody" not in render(document())


def test_chosen_failing_and_unrun_variants_look_different() -> None:
    text = render(document())
    assert re.search(r'<tr class="chosen open"><td class="word">openvino-int8-cpu', text)
    counts = {kind: text.count(f'<td class="{kind}">') for kind in ("pass", "fail", "other")}
    assert counts == {"pass": 1, "fail": 1, "other": 2}  # other: the reference and the one that was not run


@pytest.mark.parametrize("spot", ["recipe", "class", "variant", "reason", "key", "latency", "target"])
def test_what_users_name_cannot_become_markup(spot: str) -> None:
    planted = copy.deepcopy(document())
    if spot == "recipe":
        planted["name"] = planted["description"] = planted["finetune"]["metric"] = EVIL
    elif spot == "class":
        planted["finetune"]["classes"] = [EVIL, EVIL]
    elif spot == "variant":
        planted["variants"][0] = {**planted["variants"][0], "name": EVIL, "precision": EVIL, "verdict": EVIL}
    elif spot == "reason":
        planted["variants"][0]["reason"] = planted["variants"][0]["receipt"] = EVIL
    elif spot == "key":
        planted["recipe"][EVIL] = {EVIL: {EVIL: EVIL}}
    elif spot == "latency":
        planted["latency_ms"] = {EVIL: [1.0, 2.0]}
    else:
        planted["chosen"] = {EVIL: EVIL}
    text = render(planted)
    page = Page(text)
    assert "&lt;script&gt;" in text
    assert not {"script", "img"} & set(page.tags)
    assert not [name for name in page.attributes if name.startswith("on")]


def test_withheld_and_missing_values_are_dashes_never_none_or_nan() -> None:
    bare = {"name": "x", "variants": [{"name": "a", "verdict": "fail", "drop": math.nan, "p50_ms": None}]}
    page = Page(render(bare))
    assert "–" in page.text and not re.search(r"\b(None|nan|inf)\b", page.text)
    assert "svg" not in page.tags
    full = document()
    full["history"][2]["train_loss"] = math.nan
    full["latency_ms"]["torch-eager"][0] = math.inf
    assert not re.search(r"[\"' ,>](nan|inf|None)\b", render(full))


def test_figures_place_the_gate_and_the_intervals_in_order() -> None:
    svg = figures.dot_intervals(document()["variants"], 0.005)
    gate = float(re.search(r'class="gate" x1="([\d.]+)"', svg).group(1))
    right_ends = {kind: float(re.search(rf'class="{kind}" x1="[\d.]+" y1="[\d.]+" x2="([\d.]+)"', svg).group(1))
                  for kind in ("pass", "fail")}  # fmt: skip
    assert right_ends["pass"] < gate < right_ends["fail"]


def test_every_timed_call_is_drawn() -> None:
    svg = figures.latency_strips({"a": [1.0, 2.0, 50.0], "b": [3.0]})
    first, second = re.findall(r'class="calls" d="([^"]*)"', svg)
    assert first.count("M") == 3 and second.count("M") == 1
    positions = [float(x) for x in re.findall(r"M([\d.]+) ", first)]
    assert positions == sorted(positions) and max(positions) < figures.WIDTH


def test_a_flat_curve_and_a_single_epoch_are_drawn() -> None:
    assert "polyline" in figures.curve([(1, 0.5)], "loss")
    assert "polyline" in figures.curve([(1, 0.5), (2, 0.5)], "loss")
    assert figures.curve([(1, None), (2, math.nan)], "loss") == ""


def test_the_front_and_the_searches_are_drawn() -> None:
    trial = {"step": "plain", "kept": [], "drop_high": 0.02, "size_bytes": 9, "cost_ms": 0.5, "within": False}
    last = {**trial, "step": "layers left in FP32", "kept": ["conv<1>"], "drop_high": 0.004, "within": True}
    layer = {"layers": ["conv<1>"], "noise": 0.25, "macs": 0.1, "kept": True}
    search = {
        "graph": "int8-cpu",
        "budget": 0.005,
        "samples": 470,
        "evaluations": 7.5,
        "cost_model": "roofline of two cores",
        "trials": [trial, last],
        "layers": [layer],
        "kept": ["conv<1>"],
        "note": "undecided: more samples would tell",
    }
    whole = document()
    names = [variant["name"] for variant in whole["variants"]]
    text = render({**whole, "front": names[:1], "searches": [search]})
    assert "Drop and time: the front that nothing beats" in text and "Search: int8-cpu" in text
    assert "roofline of two cores), not measured" in text and "undecided: more samples would tell" in text
    assert "layers left in FP32 (1 in FP32): 0.5 ms, drop at worst 0.0040" in text
    assert "conv&lt;1&gt;" in text and "conv<1>" not in text
    assert Page(text).tags.count("svg") == Page(render(whole)).tags.count("svg") + 1
