"""How it came about: training, searches, layers as they were built, the environment, and the files that all this rests on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from html import escape
from typing import Any

from tlexport.evidence.report import markup
from tlexport.evidence.report.document import Document
from tlexport.evidence.report.figures import curves
from tlexport.evidence.report.figures import variants as drawn
from tlexport.evidence.report.markup import Cell, Section

LAYERS_SHOWN = 20  # of a search, the most harmful
LAYERS_LISTED = 300  # of a receipt
MANIFEST = "manifest.json"
HISTORY = "checkpoint/history.jsonl"
# What other sections show, and the run's path, which would say who made it.
ELSEWHERE = ("run", "headline", "baselines", "race", "classes", "task")


def layers(document: Document) -> Section:
    """The dtype of every layer as it was built, read back from the artifact."""
    summary, folded, sources = [], [], []
    for name, receipt in document.receipts.items():
        built = receipt.get("layers") or []
        counts = Counter(str(layer.get("dtype")) for layer in built)
        wrong = receipt.get("disagreements") or []
        state = (
            Cell(f"{len(wrong)} differ from what was asked", "fail") if wrong else Cell("as asked", "pass")
        )
        dtypes = (
            ", ".join(f"{dtype} × {count}" for dtype, count in counts.most_common()) or "no matrix products"
        )
        summary.append([Cell(name, "word"), dtypes, state, receipt.get("source")])
        folded.append(_folded(name, built, wrong))
        sources.append(f"variants/{name}/receipt.json")
    content = markup.table(
        ["variant", "layers by dtype", "against the graph", "read from"], summary, "dtypes by variant"
    )
    return Section("layers", "Layers as they were built", content + "".join(folded), tuple(sources))


def _folded(name: str, built: list[Mapping[str, Any]], wrong: list[str]) -> str:
    rows = [
        [layer.get("name"), layer.get("kind"), layer.get("dtype"), ", ".join(layer.get("nodes") or [])]
        for layer in built[:LAYERS_LISTED]
    ]
    listed = markup.table(["layer", "kind", "dtype", "nodes of the graph"], rows, f"layers of {name}")
    more = f"The first {LAYERS_LISTED}; the others are in the receipt." if len(built) > LAYERS_LISTED else ""
    told = "".join(markup.paragraph(text, "headline") for text in wrong)
    return markup.details(f"{name}: {len(built)} layers", told + listed + markup.paragraph(more, "quiet"))


def searches(document: Document) -> Section:
    """How each typed graph was brought within the budget, and what its layers cost."""
    content = "".join(_search(found) for found in document.quantize.get("searches") or [])
    refused = [[name, why] for name, why in (document.quantize.get("refused") or {}).items()]
    content += markup.table(["graph", "why it was not made"], refused, "graphs that were not made")
    return Section("searches", "How precision was chosen", content, (MANIFEST,))


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
    told = (
        f"Budget {markup.number(found.get('budget'), '.4g')} on {found.get('samples')} validation samples, "
        f"{markup.number(found.get('evaluations'), 'g')} evaluations; times by the cost model ({found.get('cost_model')}), not measured."
    )
    picture = markup.figure(
        drawn.front(points, found.get("budget"), "milliseconds a sample by the cost model"),
        "Each circle is a graph that was tried, its area its size; the dashed line is the budget. Named: the one that was taken.",
    )
    steps = [
        [
            trial["step"],
            str(len(trial["kept"])),
            markup.number(trial["drop_high"], ".4f"),
            markup.number(trial.get("low_macs"), ".0%"),
            markup.number(trial["cost_ms"], ".3g"),
            Cell("within", "pass") if trial["within"] else Cell("over", "fail"),
        ]
        for trial in trials
    ]
    heads = ["step", "layers in FP32", "drop at worst", "operations low", "ms by the model", "budget"]
    rows = [
        [
            " ".join(one["layers"]),
            markup.number(one["noise"], ".2e"),
            markup.number(one["macs"], ".1%"),
            "yes" if one["kept"] else "",
        ]
        for one in (found.get("layers") or [])[:LAYERS_SHOWN]
    ]
    costs = markup.table(
        ["layers", "noise", "operations", "left in FP32"], rows, "what layers cost", numeric=[1, 2]
    )
    return (
        f"<h3>{escape(str(found.get('graph')))}</h3>{markup.paragraph(told)}{markup.paragraph(str(found.get('note') or ''))}{picture}"
        + markup.table(heads, steps, "trials", numeric=range(1, 5))
        + markup.details(f"the {len(rows)} most harmful layers", costs)
    )


def training(document: Document) -> Section:
    history, metric = document.history, document.metric
    loss = [(float(row["epoch"]), row.get("train_loss")) for row in history]
    judged = [(float(row["epoch"]), (row.get("val") or {}).get(metric)) for row in history]
    panels = [
        markup.figure(curves.curve(loss, "training loss"), "Mean loss of each epoch."),
        markup.figure(
            curves.curve(judged, f"validation {metric}"), "On the validation split after each epoch."
        ),
    ]
    tuned = markup.present({key: value for key, value in document.finetune.items() if key not in ELSEWHERE})
    tuned["weights"] = markup.present(document.finetune.get("weights") or {})
    sources = (HISTORY, MANIFEST) if history else (MANIFEST,)
    return Section("training", "Fine-tuning", markup.beside(*panels) + markup.facts(tuned), sources)


def environment(document: Document) -> Section:
    machine = {"threads used": document.bench.get("threads"), **(document.bench.get("machine") or {})}
    content = "<h3>Machine that was timed</h3>" + markup.facts(markup.present(machine))
    content += "<h3>Versions</h3>" + markup.facts(dict(document.versions))
    return Section("environment", "Environment", content, ("bench.json", MANIFEST))


def recipe(document: Document) -> Section:
    content = markup.details("every key of the recipe", markup.facts(document.recipe))
    return Section("recipe", "The recipe in full", content, ("recipe.yaml",))


def sources(document: Document) -> Section:
    """Every file that a number on this page was read from."""
    rows = [
        [
            Cell(source.file, "word"),
            Cell(html=f"<code>{escape(source.sha256)}</code>"),
            Cell(source.told, "fail" if source.changed else ""),
        ]
        for source in document.sources.values()
    ]
    told = (
        "Every number on this page was read from, or computed from, one of these files of the run when the page was written. "
        "Check one with sha256sum; the run's manifest.json says which stage made it, from what, and when."
    )
    content = markup.paragraph(told) + markup.table(
        ["file", "SHA-256", "hash"], rows, "files this page rests on"
    )
    return Section("sources", "Files behind the numbers", content)
