"""baselines: plain models on the same split stand beside the fine-tuned one; each that has a graph becomes a run of its own."""

from __future__ import annotations

from typing import Any

import numpy as np

from tlexport import baselines
from tlexport.errors import DataError
from tlexport.evidence.accuracy import bootstrap, comparison
from tlexport.modalities import MODALITIES, metrics, reference
from tlexport.modalities.dataset import Dataset
from tlexport.models import checkpoint
from tlexport.progress import Progress
from tlexport.recipe import Recipe, with_overrides
from tlexport.results import Baseline, BaselinesResult, FinetuneResult, Metrics, WeightsSummary
from tlexport.run import Run


def run(run: Run, recipe: Recipe, progress: Progress) -> BaselinesResult:
    """Fit what `recipe.baselines` names into `baselines/<name>/`, and say how the fine-tuned model compares."""
    tuned = run.result("finetune", FinetuneResult)
    kept = run.require("reference", "finetune")
    config = recipe.model_dump(mode="json", include={"modality", "metric", "seed", "baselines", "verify"})
    record = run.stage("baselines", config, inputs=[run / "checkpoint", kept])
    if (finished := record.unchanged(BaselinesResult)) is not None:
        progress.say("baselines: unchanged, skipped")
        return finished
    data = MODALITIES[recipe.modality].load(
        recipe.data, task=recipe.task, seed=recipe.seed, cache=run / "cache"
    )
    found = [
        _judged(run, recipe, data, fitted, tuned, progress)
        for fitted in baselines.fit(
            recipe.modality, data, recipe.baselines, seed=recipe.seed, progress=progress
        )
    ]
    result = BaselinesResult(
        run=str(run.path), baselines=tuple(found), headline=_headline(found, tuned, recipe.metric)
    )
    record.finish(result, outputs=[run / "baselines"] if any(b.run for b in found) else [])
    if result.headline:
        progress.warn(result.headline)
    return result


def _judged(
    run: Run,
    recipe: Recipe,
    data: Dataset,
    fitted: baselines.Fitted,
    tuned: FinetuneResult,
    progress: Progress,
) -> Baseline:
    found = Metrics(
        val=metrics.evaluate(data.val.labels, fitted.val, data.task),
        test=metrics.evaluate(data.test.labels, fitted.test, data.task),
    )
    try:
        lead: bootstrap.Interval | None = _lead(run, recipe, fitted.test)
    except DataError as error:  # a test split that is too small to compare on says nothing against the model
        lead, why_not = None, str(error)
        progress.warn(f"the baseline {fitted.name} cannot be compared: {error}")
    verdict = (
        _verdict(recipe.metric, found.test.get(recipe.metric), lead) if lead else f"not compared: {why_not}"
    )
    progress.say(f"baseline {fitted.name}: {verdict}")
    made = Baseline(
        name=fitted.name,
        description=fitted.description,
        metrics=found,
        lead=lead.estimate if lead else None,
        lead_low=lead.low if lead else None,
        lead_high=lead.high if lead else None,
        verdict=verdict,
        why_not=fitted.why_not,
        seconds=round(fitted.seconds, 2),
    )
    if fitted.graph is None:
        return made
    nested = _nested(run, recipe, data, fitted, found, tuned)
    return made.model_copy(update={"run": str(nested.path)})


def _lead(run: Run, recipe: Recipe, outputs: np.ndarray) -> bootstrap.Interval:
    """How much better the fine-tuned model is on the same resamples of the test split."""
    rule = comparison.Rule.of(recipe, metrics.METRICS, metrics.HIGHER_IS_BETTER, metrics.UNBOUNDED)
    return comparison.Comparison.read(run / "reference", rule).drop(outputs)


def _verdict(metric: str, value: float | None, lead: bootstrap.Interval) -> str:
    if value is None:
        return f"{metric} is undefined"
    who = (
        "the fine-tuned model is better"
        if lead.low > 0
        else "the baseline is better"
        if lead.high < 0
        else "not to be told apart"
    )
    return f"{metric} {value:.4f}; {who}, by {lead.estimate:+.4f} ({lead.low:+.4f} to {lead.high:+.4f})"


def _headline(found: list[Baseline], tuned: FinetuneResult, metric: str) -> str:
    """The first line of the report where a plain model does at least as well."""
    winners = [b for b in found if b.lead is not None and b.lead < 0]
    if not winners:
        return ""
    best = min(winners, key=lambda b: b.lead or 0.0)
    sure = "wins" if (best.lead_high or 0.0) < 0 else "is ahead, within the noise"
    offer = (
        f"; to ship it: tlexport build {best.run}"
        if best.run
        else f" ({best.why_not})"
        if best.why_not
        else ""
    )
    return (
        f"The plain baseline {best.name} {sure}: test {metric} {best.metrics.test[metric]:.4f} against "
        f"{tuned.metrics.test[metric]:.4f} of {tuned.backbone}{offer}"
    )


def _nested(
    run: Run, recipe: Recipe, data: Dataset, fitted: baselines.Fitted, found: Metrics, tuned: FinetuneResult
) -> Run:
    """A run whose checkpoint is the baseline's graph: export, compile, verify, bench and package take it like any other."""
    assert fitted.graph is not None
    name = f"{recipe.name[: 60 - len(fitted.name)]}-{fitted.name.replace('_', '-')}"
    own = with_overrides(recipe, [f"name={name}", "precision=[fp32]", "baselines=[]"])
    nested = Run.create(run / "baselines" / fitted.name, own)
    record = nested.stage("finetune", {"baseline": fitted.name, "description": fitted.description}, inputs=[])
    extra: dict[str, Any] = {
        "class_names": data.class_names,
        "task": data.task,
        "preprocessing": data.preprocessing.describe(),
        "metrics": found.model_dump(),
        "data": data.report.model_dump(mode="json"),
        "inputs": fitted.inputs,
    }
    checkpoint.save_graph(nested / "checkpoint", fitted.graph, f"baseline/{fitted.name}", data.task, extra)
    rows = reference.drawn(data.val, recipe.search.samples, recipe.seed)
    reference.keep(
        nested / "reference",
        reference.Judged(data.test, fitted.test),
        data.train,
        samples=recipe.calibration.samples,
        seed=recipe.seed,
        validation=reference.Judged(data.val.part(rows), fitted.val[rows]),
        fields=fitted.inputs,
    )
    result = tuned.model_copy(
        update={
            "run": str(nested.path),
            "strategy": "fit",
            "backbone": f"baseline/{fitted.name}",
            "metrics": found,
            "epochs": 1,
            "best_epoch": 1,
            "seconds": round(fitted.seconds, 2),
            "images_per_second": 0.0,
            "device": "cpu",
            "race": None,
            "weights": WeightsSummary(source=fitted.description, matched=0, total=0),
        }
    )
    record.finish(result, outputs=[nested / "checkpoint", nested / "reference"])
    return nested
