from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from documents import COMPILED, FAILING, PASSING, document, forecasts

from tlexport.evidence.report.document import Document, Source
from tlexport.evidence.report.page import render, sections
from tlexport.results import Decision

VOID = {"meta", "br", "img", "circle", "line", "rect", "path"}
EVIL = "\"><script>alert(1)</script><img src=x onerror=alert(2)>' onload='x"
DATA = re.compile(r'"data:image/png;base64,[A-Za-z0-9+/=]+"')


class Page(HTMLParser):
    """Collects tags, attributes and text, and fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def changed(base: Document, **keys: Any) -> Document:
    """A document with keys of its dicts replaced: `bench={"front": []}`."""
    return dataclasses.replace(base, **{name: {**getattr(base, name), **new} for name, new in keys.items()})


def section(made: Document, key: str) -> str:
    return next(part.content for part in sections(made) if part.key == key)


@pytest.mark.parametrize("made", [document(), document(tuple("abcde")), forecasts(), forecasts(times=False)])
def test_the_page_is_well_formed_and_needs_nothing_else(made: Document) -> None:
    text = render(made)
    page = Page(text)
    bare = DATA.sub('""', text)
    assert not re.search(r"https?:|//|@import|url\(", bare)
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    sources = [value or "" for name, value in page.attributes if name in ("src", "href", "srcset", "action")]
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in sources)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "default-src 'none'" in text and "img-src data:" in text and "script-src" not in text
    assert "prefers-color-scheme: dark" in text and "@media print" in text and "@page" in text


def test_every_link_leads_to_a_section_and_every_drawing_and_part_has_a_name() -> None:
    text = render(document())
    page = Page(text)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for name, value in page.attributes if name == "href" and value} <= set(ids)
    drawings, regions = page.tags.count("svg"), text.count('role="region"')
    assert drawings >= 10 and text.count('role="img" aria-label="') == drawings
    assert text.count('role="region" aria-label="') == regions and 'nav aria-label="' in text
    assert all(alt for name, alt in page.attributes if name == "alt")


def test_what_was_measured_is_on_the_page() -> None:
    text = Page(render(document())).text
    for shown in ("openvino-int8-cpu", "0.9571", "+0.0012 [-0.0008, +0.0031]", "3.21×", "3.6", "compiled, not run here",
                  "drop up to 0.0300, the gate is 0.0050", "int8 x 50, fp32 x 3", "0.9583", "normal, pneumonia",
                  "AMD EPYC", "2.14.1", "max drop", "fastest of 1 passing", "+0.0012 [-0.0007, +0.0029]", "1900",
                  "+0.0030 [-0.0010, +0.0070]", "Worst slice: class=pneumonia", "too few samples", "int8 × 1, fp32 × 1",
                  "fc: asked int8, built fp32", "no GPU for it", "1,900", "steal percent"):  # fmt: skip
        assert shown in text, shown


def test_forecasts_show_what_regressions_are_judged_by_and_no_decisions() -> None:
    keys = [part.key for part in sections(forecasts())]
    assert "forecasts" in keys and not {"flips", "calibration", "roc", "confusion"} & set(keys)
    content = section(forecasts(), "forecasts")
    assert (
        "-16.67%" in content
        and "1.910" in content
        and "0.0570" in content
        and "400 periods, 7 lags" in content
    )
    timed, plain = content.count("<svg"), section(forecasts(times=False), "forecasts").count("<svg")
    assert (timed, plain) == (5, 3)


def test_the_gate_of_an_unbounded_metric_stands_at_its_share_of_the_reference() -> None:
    made = changed(forecasts(), verify={"reference": 0.5, "gates": {"max_drop": 0.1}})
    lines = re.findall(r'class="(axis|gate)" x1="([\d.]+)" y1="0', section(made, "drops"))
    where = {kind: float(x) for kind, x in lines}
    ends = re.search(r'<line class="fail" x1="([\d.]+)" y1="[\d.]+" x2="([\d.]+)"', section(made, "drops"))
    assert ends is not None
    # 0.5 * 0.1 = 0.05 lies beyond the worst interval, which ends at 0.03; a gate drawn at 0.1 would lie twice as far.
    share = (where["gate"] - where["axis"]) / (float(ends[2]) - where["axis"])
    assert share == pytest.approx(0.05 / 0.03, rel=0.01)


def test_each_section_names_its_files_and_their_hashes() -> None:
    made = document()
    text = render(made)
    for part in sections(made):
        if part.key == "sources":
            continue
        assert part.sources, part.key
        drawn = text[text.index(f'<section id="{part.key}"') :]
        drawn = drawn[: drawn.index("</section>")]
        for file in part.sources:
            assert f"{file} <code>{made.sources[file].sha256[:12]}</code>" in drawn, (part.key, file)
    assert all(source.sha256 in section(made, "sources") for source in made.sources.values())


def test_a_file_that_changed_since_it_was_recorded_is_called_so() -> None:
    base = document()
    told = Source("verify.json", "f" * 64, "changed since verify recorded it", changed=True)
    text = render(dataclasses.replace(base, sources={**base.sources, "verify.json": told}))
    assert text.count("changed since verify recorded it") > 3 and "changed since" not in render(base)


def test_the_page_does_not_say_who_made_it() -> None:
    assert "somebody" not in render(document())


def test_chosen_failing_and_unrun_variants_look_different() -> None:
    text = section(document(), "variants")
    assert re.search(r'<tr class="chosen open"><td class="word">openvino-int8-cpu', text)
    kinds = {kind: text.count(f'<td class="{kind}">') for kind in ("pass", "fail", "other")}
    assert kinds == {"pass": 1, "fail": 1, "other": 2}  # other: the reference and the one that was not run


def test_a_target_without_a_passing_variant_says_that_nothing_may_be_shipped() -> None:
    made = document(chosen={})
    text = render(made)
    assert "nothing may be shipped for this target" in text and "Nothing was chosen" in text
    assert list(made.compared) == ["openvino-int8-cpu"]  # the least bad is drawn


def test_decisions_are_made_at_the_operating_threshold() -> None:
    """At a threshold that nothing reaches all are decided for class 0, so that no decision flips."""
    base = document()
    never = dataclasses.replace(base.answers, decision=Decision(rule="never", thresholds=(1.1,)))
    assert "test sample" in section(base, "flips")
    content = section(dataclasses.replace(base, answers=never), "flips")
    assert "test sample" not in content
    squares = section(dataclasses.replace(base, answers=never), "confusion")
    assert squares.count(" decided as pneumonia: 0") == 4  # both truths, before and after


def test_harmful_flips_come_first_then_those_that_moved_furthest() -> None:
    base = document()
    held = base.answers
    assert held is not None
    content = section(base, "flips")
    cards = re.findall(r"test sample (\d+): <b class=\"\w+\">(harmful|harmless)", content)
    before = held.reference.argmax(axis=1)
    after = held.variants["openvino-int8-cpu"].argmax(axis=1)
    rows = np.flatnonzero(before != after)
    assert len(rows) > 1 and len(cards) == min(12, len(rows))
    words = [word for _, word in cards]
    assert words == sorted(words) and len(set(words)) == 2  # "harmful" sorts before "harmless"
    for row, word in cards:
        assert (before[int(row)] == held.labels[int(row)]) == (word == "harmful")
    moved = [abs(held.reference[int(r), before[int(r)]] - held.variants["openvino-int8-cpu"][int(r), before[int(r)]])
             for r, word in cards if word == "harmful"]  # fmt: skip
    assert moved == sorted(moved, reverse=True)


def test_flips_show_the_very_pixels_and_nothing_where_inputs_are_withheld() -> None:
    import base64
    import io

    from PIL import Image

    base = document()
    content = section(base, "flips")
    row, data = re.search(r'alt="test sample (\d+)".*?base64,([^"]+)"', content).groups()
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert np.array_equal(shown, base.answers.inputs[int(row), 0])
    withheld = dataclasses.replace(base, answers=dataclasses.replace(base.answers, inputs=None))
    assert "<img" not in render(withheld) and "test sample" in section(withheld, "flips")
    none = dataclasses.replace(base, flips=0)
    assert "<img" not in render(none)


def test_the_most_images_that_a_recipe_can_ask_for_stay_below_five_megabytes() -> None:
    """Noise does not compress, so that no photograph is larger; every decision flips."""
    base = document()
    noise = np.random.default_rng(6).integers(256, size=(200, 3, 224, 224)).astype(np.uint8)
    variant = {"openvino-int8-cpu": base.answers.reference[:, ::-1]}
    held = dataclasses.replace(base.answers, inputs=noise, variants=variant)
    text = render(dataclasses.replace(base, answers=held, flips=24))
    assert text.count("<img ") == 24 and 1e6 < len(text.encode()) < 5e6


def test_rows_windows_and_molecules_are_shown_as_a_person_reads_them() -> None:
    base = document()

    def shown(inputs: np.ndarray, preprocessing: dict[str, Any]) -> str:
        held = dataclasses.replace(base.answers, inputs=inputs, preprocessing=preprocessing)
        return section(dataclasses.replace(base, answers=held, flips=1), "flips")

    columns = [
        {"name": "income", "kind": "numeric"},
        {"name": "purpose", "kind": "categorical", "vocabulary": ["car", "house"], "unknown": -1.0},
        {"name": "rooms", "kind": "categorical", "vocabulary": ["3", "4"], "numbers": True},
    ]
    row = np.tile(np.array([[np.nan, 1.0, 4.0]], np.float32), (200, 1))
    table = shown(row, {"columns": columns})
    assert (
        "<td>missing</td>" in table
        and "<td>house</td>" in table
        and '<th scope="row">rooms</th><td>4</td>' in table
    )
    tokens = np.zeros(200, [("tokens", "i4", (4,)), ("fingerprint", "u1", (8,))])
    tokens["tokens"] = [2, 3, 0, 0]
    assert "<code>C=O</code>" in shown(tokens, {"vocabulary": ["", "?", "C", "=O"], "padding": 0})
    assert "what the model saw" in shown(np.ones((200, 8, 4), np.float32), {})


def test_a_confusion_matrix_says_what_changed_and_beyond_twenty_classes_the_worst_pairs_are_listed() -> None:
    few = section(document(("a", "b", "c")), "confusion")
    assert few.count("<svg") == 2 and 'class="cell wrong changed"' in few
    names = tuple(f"class {i}" for i in range(25))
    many = section(document(names), "confusion")
    assert "<svg" not in many and "25 classes are too many for a matrix" in many


def test_labels_of_a_multilabel_task_are_counted_where_they_were_measured() -> None:
    base = document()
    labels = np.array([[1, -1], [0, 1], [1, 0], [0, 0]], np.int8)
    made = np.array([[0.9, 0.9], [0.8, 0.7], [0.2, 0.1], [0.1, 0.6]], np.float32)
    held = dataclasses.replace(
        base.answers,
        task="multilabel",
        decision=Decision(rule="0.5", thresholds=(0.5, 0.5)),
        labels=labels,
        reference=made,
        variants={"openvino-int8-cpu": made},
        inputs=None,
    )
    found = dataclasses.replace(
        base,
        answers=held,
        finetune={**base.finetune, "task": "multilabel", "classes": ["normal", "pneumonia"]},
    )
    rows = re.findall(r"<tr><td>(\w+)</td>(.*?)</tr>", section(found, "confusion"))
    counts = {name: re.findall(r">(\d+)<", cells)[:4] for name, cells in rows}
    assert counts == {"normal": ["1", "1", "1", "1"], "pneumonia": ["1", "1", "0", "1"]}  # TP FP FN TN


@pytest.mark.parametrize(
    "spot", ["recipe", "class", "variant", "reason", "key", "latency", "target", "slice", "layer", "feature", "watch", "file"]
)  # fmt: skip
def test_what_users_name_cannot_become_markup(spot: str) -> None:
    base = document()
    planted = {
        "recipe": lambda: changed(base, recipe={"name": EVIL, "description": EVIL}, finetune={"metric": EVIL}),
        "class": lambda: document((EVIL, EVIL + "2")),
        "variant": lambda: changed(base, bench={"variants": [{**PASSING, "name": EVIL, "verdict": EVIL}, COMPILED]}),
        "reason": lambda: changed(base, bench={"variants": [{**FAILING, "reason": EVIL, "receipt": EVIL}]}),
        "key": lambda: changed(base, recipe={EVIL: {EVIL: {EVIL: EVIL}}}),
        "latency": lambda: dataclasses.replace(base, latency_ms={EVIL: [1.0, 2.0]}, started_s={EVIL: [0.0, 1.0]}),
        "target": lambda: dataclasses.replace(base, chosen={EVIL: (EVIL, EVIL)}, losers={EVIL: EVIL}),
        "slice": lambda: changed(base, verify={"evidence": [
            {"variant": "openvino-int8-cpu", "worst_slice": EVIL, "slices": [{"slice": EVIL, "note": EVIL}]}]}),
        "layer": lambda: dataclasses.replace(base, receipts={EVIL: {
            "source": EVIL, "layers": [{"name": EVIL, "kind": EVIL, "dtype": EVIL, "nodes": [EVIL]}], "disagreements": [EVIL]}}),
        "feature": lambda: dataclasses.replace(base, answers=dataclasses.replace(
            base.answers, inputs=np.zeros((200, 1), np.float32), preprocessing={"columns": [{"name": EVIL, "vocabulary": [EVIL]}]})),
        "watch": lambda: changed(base, bench={"watch": {EVIL: EVIL}, "withheld": [EVIL], "notes": [EVIL]}),
        "file": lambda: dataclasses.replace(base, sources={EVIL: Source(EVIL, EVIL, EVIL, changed=True)}),
    }[spot]()  # fmt: skip
    text = render(planted)
    page = Page(text)
    assert "&lt;script&gt;" in text
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_withheld_and_missing_values_are_dashes_never_none_or_nan() -> None:
    bare = Document(
        recipe={"name": "x"},
        finetune={},
        verify={},
        bench={"variants": [{"name": "a", "verdict": "fail", "drop": math.nan, "p50_ms": None}]},
    )
    page = Page(render(bare))
    assert "–" in page.text and not re.search(r"\b(None|nan|inf)\b", page.text)
    assert "svg" not in page.tags
    full = document(
        latency_ms={"torch-eager": [math.inf, 2.0, math.nan]}, started_s={"torch-eager": [0.0, 1.0, 2.0]}
    )
    full = dataclasses.replace(
        full, history=[{"epoch": 1, "train_loss": math.nan}, {"epoch": 2, "train_loss": 0.5}]
    )
    assert not re.search(r"[\"' ,>](nan|inf|None)\b", render(full))


def test_a_difference_that_rounds_to_zero_has_no_direction() -> None:
    made = changed(
        document(), bench={"variants": [{**PASSING, "drop": -1e-9, "drop_low": -2e-9, "drop_high": 1e-9}]}
    )
    assert "+0.0000 [+0.0000, +0.0000]" in section(made, "variants") and "-0.0000" not in render(made)


def test_what_bench_adds_later_is_shown_and_long_encodings_are_not() -> None:
    made = changed(document(), bench={"knee": {"batch": 8}, "histogram": "HISTFAAA" * 100})
    content = section(made, "conditions")
    assert "Knee" in content or "knee" in content
    assert "800 characters" in content and "HISTFAAA" * 30 not in content


def test_the_front_and_the_searches_are_drawn() -> None:
    text = render(document())
    assert "Drop and time: the front that nothing beats" in text and "int8-cpu" in section(
        document(), "searches"
    )
    assert "roofline of two cores), not measured" in text and "undecided: more samples would tell" in text
    assert "layers left in FP32 (1 in FP32): 0.6 ms, drop at worst 0.0040" in text
    assert "conv&lt;1&gt;" in text and "conv<1>" not in text
    without = changed(document(), quantize={"searches": []})
    assert Page(text).tags.count("svg") == Page(render(without)).tags.count("svg") + 1
