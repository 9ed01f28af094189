"""How fast it is: distributions and time lines of the timed calls, throughput, and what else bench wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tlexport.evidence.report import markup
from tlexport.evidence.report.document import Document
from tlexport.evidence.report.figures import latency as drawn
from tlexport.evidence.report.markup import Cell, Section

BENCH = "bench.json"
# What other parts of the page show.
ELSEWHERE = {
    "run", "reference", "reference_on_gpu", "variants", "front", "machine", "withheld", "notes", "raw",
}  # fmt: skip
IN_TABLE = {"name", "target", "precision", "backend"}
KNOWN = {
    "metric", "drop", "drop_low", "drop_high", "flips", "flips_upper", "max_abs_error", "size_bytes", "sha256", "file",
    "receipt", "options", "judged_by", "verdict", "reason", "p50_ms", "p90_ms", "p99_ms", "threads", "count", "dropped",
    "cost_ms", "calls_per_sample", "speedup", "throughput",
}  # fmt: skip


def latency(document: Document) -> Section:
    bench = document.bench
    timed = [v for v in (*document.references, *document.variants) if v.get("count")]
    kinds = document.kinds
    names = {name: kinds[name] for name in kinds if name in document.latency_ms}
    content = markup.legend(names) + _percentiles(timed)
    content += "".join(markup.paragraph(str(note), "quiet") for note in bench.get("withheld") or [])
    content += markup.figure(
        drawn.histograms(document.latency_ms, kinds),
        "How long each timed call took at batch 1. Thick bar: median; thin bars: p90 and p99, where at least ten calls "
        "are beyond. Candidates took turns, so that a drift of the machine met all alike.",
    )
    content += markup.figure(
        drawn.time_lines(document.latency_ms, document.started_s, kinds),
        "The same calls in the order they were made, each row on its own logarithmic scale: a level that shifts is a machine "
        "that changed, a lone dot a pause.",
    )
    content += _throughput(timed)
    content += "".join(markup.paragraph(str(note)) for note in bench.get("notes") or [])
    raw = (str(bench["raw"]),) if bench.get("raw") else ()
    return Section("latency", "Latency and throughput", content if timed else "", (BENCH, *raw))


def conditions(document: Document) -> Section:
    """All that bench wrote and no other section shows: how the machine behaved, histograms' summaries, the knee ..."""
    more = {key: value for key, value in document.bench.items() if key not in ELSEWHERE}
    own = {}
    for variant in document.variants:
        extra = {key: value for key, value in variant.items() if key not in KNOWN | IN_TABLE}
        if any(value not in (None, "", [], {}) for value in extra.values()):
            own[str(variant.get("name"))] = extra
    content = markup.facts(_clipped(markup.present(more))) + markup.details(
        "by variant", markup.facts(_clipped(own))
    )
    return Section("conditions", "How it was measured", content, (BENCH,))


def _percentiles(timed: list[Mapping[str, Any]]) -> str:
    rows = [
        [
            Cell(v.get("name"), "word"),
            markup.number(v.get("count"), "d"),
            *(markup.number(v.get(key), ".3g") for key in ("p50_ms", "p90_ms", "p99_ms")),
            markup.number(v.get("speedup"), ".2f", "×"),
            markup.text(v.get("threads")),
            markup.text(v.get("calls_per_sample")),
            v.get("dropped") or "",
        ]
        for v in timed
    ]
    heads = [
        "variant",
        "samples",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "speed-up",
        "threads",
        "calls a sample",
        "not measured to the end",
    ]
    if not any(row[-1] for row in rows):
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    return markup.table(heads, rows, "latency at batch 1", numeric=range(1, 8))


def _throughput(timed: list[Mapping[str, Any]]) -> str:
    sizes = sorted({int(size) for v in timed for size in v.get("throughput") or {}})
    rows = [
        [
            Cell(v.get("name"), "word"),
            *(markup.number((v["throughput"]).get(str(size)), ",.0f") for size in sizes),
        ]
        for v in timed
        if v.get("throughput")
    ]
    heads = ["samples a second", *(f"batch {size}" for size in sizes)]
    return markup.table(heads, rows, "throughput by batch size", numeric=range(1, len(heads)))


def _clipped(value: Any) -> Any:
    """The same with long texts and lists shortened: encoded histograms stay in the file."""
    if isinstance(value, Mapping):
        return {key: _clipped(part) for key, part in value.items()}
    if isinstance(value, list) and any(isinstance(part, (Mapping, list)) for part in value):
        return f"{len(value)} entries"
    return markup.shortened(value) if isinstance(value, str) else value
