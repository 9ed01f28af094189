"""What was asked, what was built, what was chosen and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from tlexport.evidence.report import markup
from tlexport.evidence.report.document import Document
from tlexport.evidence.report.figures import variants as drawn
from tlexport.evidence.report.figures.axes import verdict_kind
from tlexport.evidence.report.markup import Cell, Section

Row = Mapping[str, Any]
RECIPE, BENCH, VERIFY = "recipe.yaml", "bench.json", "verify.json"
GATES = {
    "max_drop": "largest drop at the interval's unfavourable end",
    "max_flips": "largest share of decisions that change",
    "max_p50_ms": "median latency at batch 1, ms",
    "max_p99_ms": "99th percentile of the latency, ms",
    "max_size_mb": "size of the artifact, MB",
}


def header(document: Document) -> str:
    """The name, the verdict of each target, and what has to be read first."""
    recipe, tuned = document.recipe, document.finetune
    about = [
        str(text) for text in (recipe.get("description"), tuned.get("task"), tuned.get("backbone")) if text
    ]
    lines = [f"<h1>{escape(str(recipe['name']))}</h1>", markup.paragraph(" · ".join(about), "quiet")]
    lines.append(markup.paragraph(str(document.baselines.get("headline") or ""), "headline"))
    targets = list(
        dict.fromkeys([markup.text(v.get("target")) for v in document.variants] + list(document.chosen))
    )
    cards = "".join(_card(document, target) for target in targets)
    return f'<header>{"".join(lines)}<div class="cards">{cards}</div></header>'


def _card(document: Document, target: str) -> str:
    picked = document.chosen.get(target)
    title = f"<h2>For {escape(target)}</h2>"
    if picked is None:
        why = "no variant passes its gates: nothing may be shipped for this target"
        return f'<div class="card fail">{title}<p class="name">none</p><p>{escape(why)}</p></div>'
    name, reason = picked
    variant = next((v for v in document.variants if v.get("name") == name), {})
    before = (document.bench.get("reference") or {}).get("metric")
    shown = {
        document.metric: f"{markup.number(variant.get('metric'), '.4f')} (reference {markup.number(before, '.4f')})",
        "drop": markup.interval(variant, "drop", "+.4f"),
        "p50": markup.number(variant.get("p50_ms"), ".3g", " ms"),
        "size": f"{markup.megabytes(variant.get('size_bytes'))} MB",
        "verdict": str(variant.get("verdict") or "–"),
    }
    pairs = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in shown.items())
    return (
        f'<div class="card">{title}<p class="name">{escape(name)}</p><dl>{pairs}</dl>'
        f'<p class="quiet">{escape(reason)}</p></div>'
    )


def asked(document: Document) -> Section:
    recipe, tuned = document.recipe, document.finetune
    what = {
        "task": tuned.get("task"),
        "data": (recipe.get("data") or {}).get("path"),
        "samples": tuned.get("samples"),
        "classes": markup.shortened(markup.text(tuned.get("classes"))),
        "metric": document.metric,
        "backbone": tuned.get("backbone"),
        "strategy": tuned.get("strategy"),
        "targets": list(dict.fromkeys(markup.text(v.get("target")) for v in document.variants)),
        "precisions": list(dict.fromkeys(markup.text(v.get("precision")) for v in document.variants)),
        "changed for this build": document.changed,
        "test data on this page": document.inputs_shown,
    }
    gates = document.verify.get("gates") or {}
    limits = [
        [GATES.get(key, markup.words(key)), "none" if limit is None else markup.text(limit)]
        for key, limit in gates.items()
    ]
    content = '<div class="columns">' + markup.facts(markup.present(what))
    content += markup.table(["gate", "limit"], limits, "gates", numeric=[1]) + "</div>"
    return Section("asked", "What was asked", content, (RECIPE, "manifest.json", VERIFY, BENCH))


def choice(document: Document) -> Section:
    """Which variant each target got, and why each other one did not."""
    targets = [[target, Cell(name, "word"), why] for target, (name, why) in document.chosen.items()]
    lost = [[Cell(name, "word"), why] for name, why in document.losers.items()]
    content = markup.table(["target", "chosen", "why"], targets, "chosen variants")
    if not targets:
        content = markup.paragraph("Nothing was chosen: no variant passes its gates.")
    if lost:
        content += "<h3>Not chosen</h3>" + markup.table(
            ["variant", "why not"], lost, "variants that were not chosen"
        )
    return Section("choice", "What was chosen, and why", content, (BENCH,))


def variants(document: Document) -> Section:
    """The one table that matters: what was built, how good and how fast it is, and whether it may leave."""
    columns: list[tuple[str, Callable[[Row], str]]] = [
        (document.metric, lambda v: markup.number(v.get("metric"), ".4f")),
        ("drop [interval]", lambda v: markup.interval(v, "drop", "+.4f")),
        ("max error", lambda v: markup.number(v.get("max_abs_error"), ".2g")),
        ("flips", lambda v: markup.number(v.get("flips"), "g")),
        ("p50 ms", lambda v: markup.number(v.get("p50_ms"), ".3g")),
        ("p99 ms", lambda v: markup.number(v.get("p99_ms"), ".3g")),
        ("speed-up", lambda v: markup.number(v.get("speedup"), ".2f", "×")),
        ("MB", lambda v: markup.megabytes(v.get("size_bytes"))),
    ]
    names = {name for name, _ in document.chosen.values()}
    rows: list[list[object]] = []
    kinds = []
    for variant in (*document.references, *document.variants):
        row, below = _rows(variant, columns)
        rows.append(row)
        kinds.append(f"{'chosen ' if variant.get('name') in names else ''}{'open' if below else ''}".strip())
        if below:
            rows.append(below)
            kinds.append("reason")
    heads = ["variant", "verdict", *(head for head, _ in columns)]
    whole = markup.table(heads, rows, "variants", numeric=range(2, len(heads)), kinds=kinds)
    note = "Bold: chosen. Drop: reference minus variant with its interval; positive is worse. “–”: not measured, or withheld."
    return Section("variants", "Variants", whole + markup.paragraph(note, "quiet"), (BENCH,))


def _rows(variant: Row, columns: list[tuple[str, Callable[[Row], str]]]) -> tuple[list[object], list[object]]:
    """A variant's row, and one below it with what the compiler built and why the verdict is what it is."""
    verdict = markup.text(variant.get("verdict"))
    row: list[object] = [Cell(variant.get("name"), "word"), Cell(verdict, verdict_kind(verdict))]
    row += [show(variant) for _, show in columns]
    more = " · ".join(str(variant[key]) for key in ("receipt", "reason") if variant.get(key))
    return row, [Cell(more, span=len(row))] if more else []


def front(document: Document) -> Section:
    """Drop against time, one panel a target: measured where it runs here, else by the cost model, and said so."""
    best = set(document.bench.get("front") or [])
    panels = []
    for target in dict.fromkeys(markup.text(v.get("target")) for v in document.variants):
        own = [v for v in document.variants if markup.text(v.get("target")) == target]
        measured = any(v.get("p50_ms") is not None for v in own)
        key, words = (
            ("p50_ms", "median latency") if measured else ("cost_ms", "by the cost model, not measured")
        )
        points = [{**v, "time": v.get(key), "front": v.get("name") in best} for v in own]
        panels.append(
            markup.figure(
                drawn.front(points, None, f"{target}: milliseconds a sample, {words}"),
                f"{target}: each circle is a variant, its area the size of the file. Left is faster, lower is closer to the "
                "reference. Named: those that no other variant beats in drop, time and size at once; the line is the front of "
                "drop and time alone. Green passes its gates, red does not.",
            )
        )
    return Section("front", "Drop and time: the front that nothing beats", "".join(panels), (BENCH,))


def drops(document: Document) -> Section:
    """Each drop with its interval beside the gate, and the test behind the verdict."""
    gates = document.verify.get("gates") or {}
    listed = document.verify.get("variants") or []
    limit = gates.get("max_drop")
    # rmse, mae and qlike are limited as a share of the reference's value: the line then stands elsewhere.
    if document.metric in ("rmse", "mae", "qlike") and limit is not None:
        limit = limit * (document.verify.get("reference") or 0)
    confidence = markup.number(document.verify.get("confidence"), ".0%")
    picture = markup.figure(
        drawn.dot_intervals(listed, limit),
        f"Reference minus variant in {document.metric} on the same {markup.text(document.verify.get('samples'))} test samples, with its "
        f"{confidence} interval. A variant passes where the whole bar stands left of the dashed gate.",
    )
    rows = [
        [
            Cell(v["name"], "word"),
            markup.interval(v, "drop", "+.4f"),
            markup.p_value(found.get("p")),
            markup.p_value(found.get("p_adjusted")),
            markup.text(found.get("needed")),
            Cell(v.get("verdict"), verdict_kind(str(v.get("verdict")))),
        ]
        for v in listed
        if (found := document.evidence(v["name"]))
    ]
    tests = markup.table(
        ["variant", "drop [interval]", "p (drop ≥ limit)", "p, Holm", "samples needed", "verdict"],
        rows,
        "tests of non-inferiority",
        numeric=range(1, 5),
    )
    return Section("drops", "Drop against the gate", picture + tests, (VERIFY,))


def baselines(document: Document) -> Section:
    """What a sceptic would have used instead, on the same split."""
    metric = document.metric
    rows = [
        [
            Cell(b.get("name"), "word"),
            markup.number(((b.get("metrics") or {}).get("test") or {}).get(metric), ".4f"),
            markup.interval(b, "lead", "+.4f"),
            b.get("description"),
        ]
        for b in document.baselines.get("baselines") or []
    ]
    heads = ["plain model", f"test {metric}", "lead of the fine-tuned model", "what it is"]
    return Section(
        "baselines",
        "Beside plain models",
        markup.table(heads, rows, "plain models on the same split", numeric=[1, 2]),
        ("manifest.json",),
    )
