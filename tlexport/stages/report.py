"""report: what the run measured, as one HTML file without outside references."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tlexport.evidence.report import page
from tlexport.progress import Progress
from tlexport.recipe import Recipe
from tlexport.results import BaselinesResult, BenchResult, FinetuneResult, QuantizeResult
from tlexport.run import Run, read_json, versions, write_text


def run(run: Run, recipe: Recipe, progress: Progress) -> Path:
    """Write report.html from bench.json, the checkpoint's metrics and history, and the raw latency samples."""
    measured = BenchResult.model_validate(read_json(run.require("bench.json", "bench")))
    tuned = run.result("finetune", FinetuneResult)
    beside = run.result("baselines", BaselinesResult) if "baselines" in run.manifest["stages"] else None
    epochs = run / "checkpoint" / "history.jsonl"
    history = (
        [json.loads(line) for line in epochs.read_text(encoding="utf-8").splitlines()]
        if epochs.is_file()
        else []
    )
    with np.load(run / measured.raw, allow_pickle=False) as raw:
        samples = {name: (raw[name] * 1e3).round(4).tolist() for name in raw.files}
    searches = run.result("quantize", QuantizeResult).searches
    document = {
        "name": recipe.name,
        "description": recipe.description,
        "recipe": recipe.model_dump(mode="json"),
        "finetune": tuned.model_dump(mode="json"),
        "headline": beside.headline if beside else "",
        "baselines": [b.model_dump(mode="json", exclude={"run"}) for b in beside.baselines] if beside else [],
        "history": history,
        "reference": measured.reference.model_dump(mode="json"),
        "variants": [variant.model_dump(mode="json") for variant in measured.variants],
        "front": list(measured.front),
        "searches": [found.model_dump(mode="json") for found in searches],
        "gates": recipe.gates.model_dump(),
        "latency_ms": samples,
        "withheld": list(measured.withheld),
        "machine": measured.machine,
        "threads": measured.threads,
        "versions": versions(),
    }
    write_text(run / "report.html", page.render(document))
    return run / "report.html"
