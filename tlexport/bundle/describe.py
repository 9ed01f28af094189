"""What a bundle or a run holds, without loading any of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tlexport.bundle import manifest, preflight
from tlexport.errors import BundleError
from tlexport.results import InspectResult, Variant
from tlexport.run import Run


def describe(path: Path) -> InspectResult:
    """A bundle (every hash checked) or a run. Raises BundleError if it is neither, or altered."""
    if (path / "recipe.yaml").is_file() and not manifest.stands_in(path):
        return InspectResult(path=str(path), kind="run", summary=_run(Run(path)))
    if (path / manifest.NAME).is_file():
        return InspectResult(path=str(path), kind="bundle", summary=_bundle(preflight.check(path)))
    raise BundleError(f"{path} is neither a bundle (manifest.json) nor a run (recipe.yaml)")


def _bundle(document: manifest.Manifest) -> dict[str, Any]:
    prepared = document.preprocessing
    summary: dict[str, Any] = {
        "name": document.name,
        "model": f"{document.backbone}, {document.modality}, {document.task}, {len(document.classes)} classes: "
        + ", ".join(document.classes[:10]),
        "input": ", ".join(f"{t.name} {t.dtype} {list(t.shape)}" for t in document.inputs),
        "output": ", ".join(f"{t.name} {t.dtype} {list(t.shape)}" for t in document.outputs),
        "client must": ", ".join(f"{key} {value}" for key, value in prepared.items()),
        "batch": f"{document.batch.min} to {document.batch.max}",
        **({"decision": document.decision.in_words()} if document.decision else {}),
        f"reference {document.metric}": "not known"
        if document.reference is None
        else f"{document.reference:.4f}",
    }
    for target, entry in document.targets.items():
        summary[f"target {target}"] = f"{entry.variant.name}: {_measured(entry.variant, document.metric)}"
        summary[f"why for {target}"] = entry.reason
    summary["files"] = (
        f"{len(document.files)}, {sum(file.bytes for file in document.files.values()) / 1e6:.1f} MB, every SHA-256 as recorded"
    )
    return summary


def _measured(variant: Variant, metric: str) -> str:
    parts = [
        f"{metric} {variant.metric:.4f}" if variant.metric is not None else "",
        f"drop at worst {variant.drop_high:+.4f}" if variant.drop_high is not None else "",
    ]
    parts += [
        f"p50 {variant.p50_ms:.2f} ms" if variant.p50_ms is not None else "",
        f"built {variant.receipt}",
        variant.verdict,
    ]
    return ", ".join(part for part in parts if part)


def _run(run: Run) -> dict[str, Any]:
    stages = run.manifest["stages"]
    summary: dict[str, Any] = {
        "name": run.recipe.name,
        "data": run.recipe.data.path,
        "backbone": run.recipe.backbone.name,
    }
    for name, record in stages.items():
        summary[name] = f"{record['finished']}, {record['seconds']:.1f} s"
    if "finetune" in stages:
        summary["test"] = {
            name: round(value, 4) for name, value in stages["finetune"]["result"]["metrics"]["test"].items()
        }
    return summary
