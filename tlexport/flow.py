"""The whole way: stages joined in the order that a build runs them. The only place that imports several."""

from __future__ import annotations

import time
from pathlib import Path

from tlexport import cores
from tlexport.bundle.preflight import NOBODY, Trust
from tlexport.bundle.signing import Sign
from tlexport.errors import GateError, RecipeError
from tlexport.evidence.gate import rule, store
from tlexport.evidence.gate.sessions import Build
from tlexport.progress import Progress
from tlexport.recipe import Recipe
from tlexport.results import BuildResult, ExplainResult, FinetuneResult, GateResult
from tlexport.run import Run
from tlexport.stages import (
    baselines,
    bench,
    compile,
    explain,
    export,
    finetune,
    gate,
    measure,
    package,
    quantize,
    report,
    verify,
)


def tune(run: Run, recipe: Recipe, progress: Progress) -> FinetuneResult:
    """finetune -> baselines: the fine-tuned model with what stands beside it; what is unchanged is skipped."""
    tuned = finetune.run(run, recipe, progress)
    if not recipe.baselines:
        return tuned
    beside = baselines.run(run, recipe, progress)
    return tuned.model_copy(update={"baselines": beside.baselines, "headline": beside.headline})


def build(
    run: Run, recipe: Recipe, progress: Progress, *, bundle: Path, sign: Sign | None = None
) -> BuildResult:
    """export -> quantize -> compile -> verify -> bench -> package; what is unchanged is skipped; `sign` signs the bundle.

    Targets without a passing variant are listed in `failed`, and no bundle is written then.
    """
    compile.require_targets(recipe)
    seconds: dict[str, float] = {}
    for name, stage in (
        ("export", export),
        ("quantize", quantize),
        ("compile", compile),
        ("verify", verify),
        ("bench", bench),
    ):
        started = time.monotonic()
        stage.run(run, recipe, progress)
        seconds[name] = round(time.monotonic() - started, 2)
    measured = bench.load(run)
    html = report.run(run, recipe, progress).path
    started = time.monotonic()
    packaged, failed = None, {}
    try:
        packaged = package.run(run, recipe, progress, out=bundle, sign=sign)
    except GateError as error:
        failed = package.failures(measured.variants, recipe.targets) or {"all": str(error)}
    seconds["package"] = round(time.monotonic() - started, 2)
    return BuildResult(
        run=str(run.path),
        bundle=packaged.bundle if packaged else None,
        report=html,
        chosen=packaged.chosen if packaged else {},
        reasons=packaged.reasons if packaged else {},
        losers=packaged.losers if packaged else {},
        front=measured.front,
        reference=measured.reference,
        reference_on_gpu=measured.reference_on_gpu,
        variants=measured.variants,
        seconds=seconds,
        failed=failed,
        notes=measured.notes,
    )


def explain_drop(run: Run, recipe: Recipe, progress: Progress, *, name: str, samples: int) -> ExplainResult:
    """Where the error of a graph or variant enters; see stages.explain."""
    return explain.run(
        run, recipe, progress, name=name, samples=samples, export=lambda: export.fresh(run, recipe)
    )


def latency_gate(
    path: Path,
    progress: Progress,
    *,
    against: Path | None = None,
    baseline: Path | None = None,
    save: bool = False,
    target: str | None = None,
    tolerance: float | None = None,
    seconds: float | None = None,
    history: Path | None = None,
    trust: Trust = NOBODY,
) -> GateResult:
    """What a run's or bundle's target got, held `against` another one or a stored baseline, or saved as that; see stages.gate.

    `history`: SVG to draw of the recordings. Raises RecipeError for a combination that has no meaning.
    """
    if against and (baseline or save or history):
        raise RecipeError(
            "--against compares two builds and needs no baseline: leave out --baseline, --save-baseline and --history"
        )
    build = _to_be_timed(path, target, trust)
    tolerance = rule.TOLERANCE if tolerance is None else tolerance
    seconds = gate.SECONDS if seconds is None else seconds
    if against:
        return gate.beside(
            build,
            _to_be_timed(against, target, trust),
            progress,
            path=path,
            against=against,
            tolerance=tolerance,
            seconds=seconds,
        )
    file = baseline or store.DEFAULT
    if save:
        result = gate.save_baseline(build, progress, path=path, file=file, seconds=seconds)
    else:
        result = gate.against_baseline(
            build, progress, path=path, file=file, tolerance=tolerance, seconds=seconds
        )
    if history and result.new_ms:
        gate.write_history(build, file, history)
    return result


def _to_be_timed(path: Path, target: str | None, trust: Trust = NOBODY) -> Build:
    """A measured subject as one that another process can load."""
    subject = measure.subject(path, target, trust)
    most = cores.usable()
    return Build(
        model=subject.model,
        variant=subject.name,
        sha256=subject.variant.sha256 or "",
        threads=min(subject.variant.threads or most, most),
        batch=1,
        load=subject.load,
        inputs=subject.batch,
    )
