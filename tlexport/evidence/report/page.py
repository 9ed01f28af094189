"""The report: one HTML file that needs nothing else, made from plain data.

`render` takes a dict of these keys. All but `name` and `variants` may be missing; a value may be None.

    name description          str
    variants reference        results.Variant as dicts: a list, and one
    chosen                    {target: variant's name}
    front                     list of str: variants on the Pareto front
    searches                  list of results.GraphSearch as dicts
    gates                     {max_drop, ...}: limits
    withheld                  list of str: percentiles not stated, and why
    latency_ms                {variant's name: [ms, ...]}: timed calls
    finetune                  results.FinetuneResult as a dict
    headline                  str: what has to be read first
    baselines                 list of results.Baseline as dicts
    history                   list of {epoch, train_loss, val: {metric: value}, ...}
    recipe machine versions   dicts, shown as they are
    threads                   int: how many each backend used
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from tlexport.evidence.report import figures

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1c1e21; --quiet: #667; --rule: #d9dce1; --paper: #fff;
  --accent: #2158a8; --pass: #1f7a4d; --fail: #b3372f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e6ea; --quiet: #9aa1ad; --rule: #363b43; --paper: #16181c;
    --accent: #7fb0f5; --pass: #63c093; --fail: #ef8a80;
  }
}
body {
  margin: 0 auto; max-width: 66rem; padding: 2.5rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.05rem; margin: 2.4rem 0 .6rem; }
.headline { font-weight: 600; color: var(--fail); margin-bottom: 1rem; }
p { margin: .3rem 0; max-width: 46rem; }
.quiet, caption, th, svg text { color: var(--quiet); fill: var(--quiet); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--rule); text-align: left; }
td { vertical-align: top; }
th { font-weight: 500; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.word { white-space: nowrap; }
tr.chosen td:first-child { font-weight: 600; }
tr.open td { border-bottom: 0; }
tr.reason td { padding-top: 0; }
td.pass { color: var(--pass); }
td.fail { color: var(--fail); }
svg { max-width: 100%; height: auto; }
svg text { font-size: 11.5px; }
line { stroke-width: 1.5; }
line.pass, circle.pass { stroke: var(--pass); fill: var(--pass); }
line.fail, circle.fail { stroke: var(--fail); fill: var(--fail); }
line.other, circle.other { stroke: var(--quiet); fill: var(--quiet); }
line.axis { stroke: var(--quiet); stroke-width: 1; }
line.grid { stroke: var(--rule); stroke-width: 1; }
line.gate { stroke: var(--fail); stroke-dasharray: 5 4; }
line.median { stroke: var(--ink); stroke-width: 2.5; }
path.calls { stroke: var(--accent); opacity: .3; }
.curve { fill: none; stroke: var(--accent); stroke-width: 2; }
circle.end { fill: var(--accent); }
.beside { display: flex; flex-wrap: wrap; gap: 1rem; }
.columns { display: flex; flex-wrap: wrap; gap: 0 3.5rem; align-items: flex-start; }
@page { margin: 14mm; }
@media print {
  body { font-size: 10pt; max-width: none; padding: 0; }
  table { font-size: 7.5pt; }
  th, td { padding-right: .4rem; }
  td.number, th.number, td.word { white-space: normal; }
  svg, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  .scroll { overflow: visible; }
}
"""
LAYERS_SHOWN = 20  # of a search, the most harmful
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render(document: Mapping[str, Any]) -> str:
    """The whole page. Every text in `document` is escaped: class and file names are what users chose."""
    title = f"{document['name']}: is it still the same model?"
    sections = [
        _header(document),
        _variants(document),
        _baselines(document),
        _drops(document),
        _front(document),
        _searches(document),
        _latency(document),
        _training(document),
        _facts(
            "Machine", _present({"threads used": document.get("threads")}) | (document.get("machine") or {})
        ),
        _facts("Versions", document.get("versions")),
        _facts("Recipe", document.get("recipe")),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><style>{STYLE}</style></head>\n'
        f"<body>{''.join(sections)}</body></html>\n"
    )


def _header(document: Mapping[str, Any]) -> str:
    chosen = document.get("chosen") or {}
    lines = [f"<h1>{escape(str(document['name']))}</h1>"]
    if document.get("headline"):
        lines.insert(0, f'<p class="headline">{escape(str(document["headline"]))}</p>')
    tuned = document.get("finetune") or {}
    about = [
        str(text) for text in (document.get("description"), tuned.get("task"), tuned.get("backbone")) if text
    ]
    if about:
        lines.append(f'<p class="quiet">{escape(" · ".join(about))}</p>')
    lines += [
        f"<p>For <b>{escape(str(target))}</b>: {escape(_text(name))}</p>" for target, name in chosen.items()
    ]
    return f"<header>{''.join(lines)}</header>"


def _variants(document: Mapping[str, Any]) -> str:
    """The one table that matters: what was built, how good and how fast it is, and whether it may leave."""
    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        (_metric(document), lambda v: _number(v.get("metric"), "{:.4f}")),
        ("drop [interval]", _drop),
        ("max error", lambda v: _number(v.get("max_abs_error"), "{:.2g}")),
        ("flips", lambda v: _number(v.get("flips"), "{:g}")),
        ("p50 ms", lambda v: _number(v.get("p50_ms"), "{:.3g}")),
        ("p99 ms", lambda v: _number(v.get("p99_ms"), "{:.3g}")),
        ("speed-up", lambda v: _number(v.get("speedup"), "{:.2f}×")),
        ("MB", lambda v: _number(_scaled(v.get("size_bytes"), 1e-6), "{:.1f}")),
    ]
    chosen = set((document.get("chosen") or {}).values())
    listed = [v for v in (document.get("reference"), *document["variants"]) if v]
    rows = "".join(_variant(v, columns, v.get("name") in chosen) for v in listed)
    heads = "".join(f"<th>{h}</th>" for h in ("variant", "target", "precision"))
    heads += "".join(f'<th class="number">{escape(h)}</th>' for h, _ in columns) + "<th>verdict</th>"
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    notes = ["Bold: chosen. “–”: not measured, or withheld.", *(document.get("withheld") or [])]
    notes = [f'<p class="quiet">{escape(str(note))}</p>' for note in notes]
    return _section("Variants", f'<div class="scroll">{table}</div>{"".join(notes)}')


def _baselines(document: Mapping[str, Any]) -> str:
    """What a sceptic would have used instead, on the same split."""
    metric = _metric(document)
    heads = ("plain model", f"test {metric}", "lead of the fine-tuned model", "what it is")
    rows = "".join(
        f'<tr><td class="word">{escape(_text(b.get("name")))}</td>'
        f'<td class="number">{escape(_number(((b.get("metrics") or {}).get("test") or {}).get(metric), "{:.4f}"))}</td>'
        f'<td class="number">{escape(_lead(b))}</td>'
        f"<td>{escape(_text(b.get('description')))}</td></tr>"
        for b in document.get("baselines") or []
    )
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return _section("Beside plain models", table if rows else "")


def _lead(baseline: Mapping[str, Any]) -> str:
    lead, low, high = (_number(baseline.get(key), "{:+.4f}") for key in ("lead", "lead_low", "lead_high"))
    return f"{lead} [{low}, {high}]"


def _variant(
    variant: Mapping[str, Any],
    columns: Sequence[tuple[str, Callable[[Mapping[str, Any]], str]]],
    chosen: bool,
) -> str:
    """A variant's row, and one below it with what the compiler built and why the verdict is what it is."""
    words = "".join(
        f'<td class="word">{escape(_text(variant.get(key)))}</td>' for key in ("name", "target", "precision")
    )
    numbers = "".join(f'<td class="number">{escape(show(variant))}</td>' for _, show in columns)
    verdict = _text(variant.get("verdict"))
    kind = figures.verdict_kind(verdict)
    more = " · ".join(str(variant[key]) for key in ("receipt", "reason") if variant.get(key))
    classes = " ".join(c for c, on in (("chosen", chosen), ("open", bool(more))) if on)
    below = (
        f'<tr class="reason quiet"><td colspan="{len(columns) + 4}">{escape(more)}</td></tr>' if more else ""
    )
    return f'<tr class="{classes}">{words}{numbers}<td class="{kind}">{escape(verdict)}</td></tr>{below}'


def _drop(variant: Mapping[str, Any]) -> str:
    drop, low, high = (_number(variant.get(key), "{:+.4f}") for key in ("drop", "drop_low", "drop_high"))
    return drop if low == high == "–" else f"{drop} [{low}, {high}]"


def _drops(document: Mapping[str, Any]) -> str:
    gates = _present(document.get("gates") or {})
    figure = figures.dot_intervals(document["variants"], gates.get("max_drop"))
    return _section("Drop against the gate", figure) + _facts("Gates", gates)


def _front(document: Mapping[str, Any]) -> str:
    """Drop against time, one panel a target: measured where it runs here, else by the cost model, and said so."""
    best = set(document.get("front") or [])
    targets = dict.fromkeys(str(v.get("target")) for v in document["variants"])
    panels = []
    for target in targets:
        own = [v for v in document["variants"] if v.get("target") == target]
        measured = any(v.get("p50_ms") is not None for v in own)
        key, words = (
            ("p50_ms", "median latency") if measured else ("cost_ms", "by the cost model, not measured")
        )
        points = [{**v, "time": v.get(key), "front": v.get("name") in best} for v in own]
        panels.append(figures.front(points, None, f"{target}: milliseconds a sample, {words}; area: size"))
    return _section("Drop and time: the front that nothing beats", "".join(panels))


def _searches(document: Mapping[str, Any]) -> str:
    """How each typed graph was brought within the budget, and what its layers cost."""
    return "".join(_search(found) for found in document.get("searches") or [])


def _search(found: Mapping[str, Any]) -> str:
    trials = found.get("trials") or []
    points = [
        {
            "name": f"{trial['step']} ({len(trial['kept'])} in FP32)",
            "time": trial["cost_ms"],
            "drop_high": trial["drop_high"],
            "size_bytes": trial["size_bytes"],
            "verdict": "pass" if trial["within"] else "fail",
            "front": trial["kept"] == found.get("kept") and trial["within"],
        }
        for trial in trials
    ]
    words = (
        f"Budget {_number(found.get('budget'), '{:.4g}')} on {found.get('samples')} validation samples, "
        f"{_number(found.get('evaluations'), '{:g}')} evaluations; times by the cost model ({found.get('cost_model')}), not measured."
    )
    figure = figures.front(
        points, found.get("budget"), "milliseconds a sample by the cost model; dashed: the budget"
    )
    layers = [
        {
            "layers": " ".join(layer["layers"]),
            "noise": layer["noise"],
            "share of the operations": layer["macs"],
            "left in FP32": layer["kept"],
        }
        for layer in (found.get("layers") or [])[:LAYERS_SHOWN]
    ]
    return _section(
        f"Search: {found.get('graph')}",
        f'<p class="quiet">{escape(words)} {escape(str(found.get("note") or ""))}</p>{figure}{_rows(layers)}',
    )


def _rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same keys under their names."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(str(key))}</th>" for key in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_text(value))}</td>" for value in row.values()) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _latency(document: Mapping[str, Any]) -> str:
    return _section("Latency at batch 1", figures.latency_strips(document.get("latency_ms") or {}))


def _training(document: Mapping[str, Any]) -> str:
    history, metric = document.get("history") or [], _metric(document)
    loss = [(row["epoch"], row.get("train_loss")) for row in history]
    judged = [(row["epoch"], (row.get("val") or {}).get(metric)) for row in history]
    panels = figures.curve(loss, "training loss") + figures.curve(judged, f"validation {metric}")
    curves = _section("Training", f'<div class="beside">{panels}</div>' if panels else "")
    # The run's path would say who made it.
    tuned = {
        key: value
        for key, value in (document.get("finetune") or {}).items()
        if key not in ("run", "headline", "baselines", "race")
    }
    return curves + _facts("Fine-tuning", tuned)


def _metric(document: Mapping[str, Any]) -> str:
    return str((document.get("finetune") or {}).get("metric") or "metric")


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{content}</section>" if content else ""


def _facts(heading: str, values: Mapping[str, Any] | None) -> str:
    """A nested dict as tables of keys and values, one for each dict inside it."""
    tables = _tables("", values or {})
    return _section(heading, f'<div class="columns">{"".join(tables)}</div>' if tables else "")


def _tables(caption: str, values: Mapping[str, Any]) -> list[str]:
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    tables = [_table(caption, plain)] if plain else []
    for key, value in values.items():
        if isinstance(value, Mapping):
            tables += _tables(f"{caption} {key}".strip(), value)
    return tables


def _table(caption: str, values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(_words(key))}</th><td>{escape(_text(value))}</td></tr>"
        for key, value in values.items()
    )
    return f"<table>{f'<caption>{escape(_words(caption))}</caption>' if caption else ''}{rows}</table>"


def _words(key: object) -> str:
    return str(key).replace("_", " ")


def _text(value: object) -> str:
    """Any value as a reader would write it."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return _number(value, "{:.5g}")
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(key)}: {_text(part)}" for key, part in value.items()) or "–"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(part) for part in value) or "–"
    return str(value)


def _number(value: object, form: str) -> str:
    if isinstance(value, (int, float)) and math.isfinite(value):
        return form.format(value)
    return "–"


def _scaled(value: object, factor: float) -> float | None:
    return value * factor if isinstance(value, (int, float)) else None
